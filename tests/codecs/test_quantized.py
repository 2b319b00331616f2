"""The codec `quantized`: rotation, bit streams, coders, feedback of errors, files."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import Moments, QuantizedConfig, QuantizedMatrix
from resmoe_dist.codecs.bit_streams import pack_stream, read_windows
from resmoe_dist.codecs.coders import ScalarCoder, TrellisCoder, make_coder
from resmoe_dist.codecs.moments import inverse_root
from resmoe_dist.codecs.rotation import hadamard_block, rotate, rotate_back
from resmoe_dist.kernels.cpu.build import load_kernels

# Rotation


@pytest.mark.parametrize(
    ("hidden", "block"), [(4096, 4096), (2880, 64), (7168, 1024), (48, 16), (24, 1), (7, 1)]
)
def test_the_rotation_is_orthogonal_and_has_blocks_of_the_largest_power_of_two(hidden, block):
    assert hadamard_block(hidden) == block
    if hidden > 3000:
        return
    turned = rotate(torch.eye(hidden))
    torch.testing.assert_close(turned @ turned.T, torch.eye(hidden), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate_back(turned), torch.eye(hidden), atol=1e-5, rtol=0)
    assert int((turned[0] != 0).sum()) == block


def test_the_signs_of_the_rotation_are_fixed():
    """Files depend on them: computed here with Python's integers."""

    def sign(position: int) -> float:
        mixed = position * 0x9E3779B9 & 0xFFFFFFFF
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
        return 1.0 - 2.0 * (mixed >> 31)

    expected = torch.tensor([sign(i + 1) for i in range(64)])
    # The first row of a Hadamard matrix is all ones.
    found = rotate(torch.eye(64))[:, 0] * 8
    torch.testing.assert_close(found, expected)
    assert 20 < int((expected > 0).sum()) < 44


# Bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("prefix_bits", [0, 5, 10])
def test_windows_are_read_at_any_position(bits, prefix_bits):
    rows, count = 3, 29
    prefix = torch.randint(1 << prefix_bits, (rows,))
    symbols = torch.randint(1 << bits, (rows, count))
    stream = pack_stream(prefix, prefix_bits, symbols, bits)
    window = prefix_bits + bits
    for row in range(rows):
        number = int(prefix[row])
        for i, symbol in enumerate(symbols[row].tolist()):
            number |= symbol << (prefix_bits + bits * i)
        assert stream[row].numpy().tobytes() == number.to_bytes(stream.shape[1], "little")
        for first, some in ((0, count), (7, 11)):
            expected = [number >> (bits * (first + i)) & ((1 << window) - 1) for i in range(some)]
            found = read_windows(stream[row : row + 1], first, some, bits, window)
            assert found[0].tolist() == expected


# Coders


def _error(bits: int, coder: str, columns: int) -> float:
    """Mean squared error per entry of unit Gaussian noise, with the matrix's own scales."""
    torch.manual_seed(7)
    noise = torch.randn(96, columns)
    config = QuantizedConfig(bits=bits, coder=coder, rotate=False, group_size=128, blocks=1)
    encoded = QuantizedMatrix.encode(noise, config, torch.float32)
    overhead = 8 * encoded.nbytes / noise.numel() - bits
    assert overhead <= 0.13, f"{overhead} bits beside the code"
    return float((encoded.decode() - noise).square().mean())


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.125), (3, 0.040), (4, 0.0125)])
def test_scalar_codes_of_noise_lose_little(bits, limit):
    assert _error(bits, "scalar", 512) <= limit


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.078), (3, 0.0205), (4, 0.0054)])
def test_trellis_codes_of_noise_lose_less_than_any_scalar_code(bits, limit):
    """The limits are 0.16 bit, 0.2 bit and 0.24 bit from the rate-distortion bound 2^(−2b)."""
    assert load_kernels()
    assert _error(bits, "trellis", 512) <= limit


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_steps_are_those_of_least_error(bits):
    """Moving the scale by 10 % either way loses more."""
    torch.manual_seed(0)
    noise = torch.randn(200, 100)
    coder = ScalarCoder(bits)

    def error(scale: float) -> float:
        return float((coder.encode(noise / scale, None, 100)[2] * scale - noise).square().mean())

    assert error(coder.step) < min(error(coder.step * 0.9), error(coder.step * 1.1))


def test_windows_of_the_trellis_stand_for_sums_of_the_bytes_of_a_hash():
    coder = TrellisCoder(2)
    for window in (0, 1, 4095):
        products = [(window + 14 * 4096) * factor % 2**16 for factor in (59041, 5771)]
        expected = sum(sum(struct.unpack("<2b", struct.pack("<H", each))) for each in products)
        assert coder.integers(torch.tensor(window)) == expected


@pytest.mark.parametrize(
    "coder",
    [*(ScalarCoder(bits) for bits in (1, 2, 3, 4, 8)), *(TrellisCoder(bits) for bits in (1, 4))],
    ids=lambda coder: f"{coder.name}-{coder.bits}",
)
def test_integers_are_sums_of_bytes(coder):
    """As the kernels of the GPU compute them."""
    mark, factors, flipped, offset = coder.byte_sum
    windows = range(1 << coder.window)
    sums = []
    for window in windows:
        first, second = ((window | mark) * factor % 2**16 for factor in factors)
        sums.append(sum(((first + 2**16 * second) ^ flipped).to_bytes(4, "little")))

    assert coder.integers(torch.tensor(windows)).tolist() == [total - offset for total in sums]


def test_a_coder_with_wrong_bits_is_refused():
    with pytest.raises(ValueError, match="at most 4 bits, not 8"):
        make_coder("trellis", 8)
    with pytest.raises(ValueError, match="bits 5: choose one of 1, 2, 3, 4, 8"):
        make_coder("scalar", 5)
    with pytest.raises(ValueError, match="at most 4 bits"):
        QuantizedConfig(bits=8, coder="trellis")


# Matrices


def _moments(hidden: int, rows: int) -> Moments:
    """Of inputs that are far from independent."""
    inputs = torch.randn(400, hidden) @ torch.randn(hidden, hidden)
    neurons = torch.randn(400, rows) @ torch.randn(rows, rows)
    return Moments(inputs.T @ inputs / 400, neurons.T @ neurons / 400)


def _lost(matrix: Tensor, encoded: QuantizedMatrix, moments: Moments) -> list[float]:
    """tr(Δ S Δᵀ) of gate, up and down."""
    delta = (matrix - encoded.decode()).double()
    gate, up, down = delta.split(moments.input_HH.shape[0], dim=1)
    inputs, neurons = moments.input_HH.double(), moments.neuron_II.double()
    return [
        float(x)
        for x in (
            (gate @ inputs * gate).sum(),
            (up @ inputs * up).sum(),
            (down.T @ neurons * down.T).sum(),
        )
    ]


@pytest.mark.parametrize("coder", ["scalar", "trellis"])
@pytest.mark.parametrize("rotated", [False, True])
def test_feedback_of_errors_lowers_the_error_of_every_output(coder, rotated):
    torch.manual_seed(3)
    assert load_kernels()
    rows, hidden = 48, 64
    matrix, moments = torch.randn(rows, 3 * hidden), _moments(hidden, rows)
    config = QuantizedConfig(bits=2, coder=coder, rotate=rotated)
    plain = QuantizedMatrix.encode(matrix, config, torch.float32)
    fed_back = QuantizedMatrix.encode(matrix, config, torch.float32, moments=moments)
    for before, after in zip(
        _lost(matrix, plain, moments), _lost(matrix, fed_back, moments), strict=True
    ):
        assert after < 0.8 * before


@pytest.mark.parametrize("coder", ["scalar", "trellis"])
def test_errors_are_fed_back_in_fewer_columns_than_the_search_looks_ahead(coder):
    rows, hidden = 12, 8
    matrix, moments = torch.randn(rows, 3 * hidden), _moments(hidden, rows)
    config = QuantizedConfig(bits=4, coder=coder)
    encoded = QuantizedMatrix.encode(matrix, config, torch.float32, moments=moments)
    assert (matrix - encoded.decode()).norm() < 0.5 * matrix.norm()


def test_scalar_feedback_is_that_of_the_definition():
    """Column by column, with the remaining columns solved anew by least squares each time."""
    torch.manual_seed(5)
    rows, hidden = 6, 16
    matrix = torch.randn(rows, hidden).double()
    moment = _moments(hidden, rows).input_HH.double()
    config = QuantizedConfig(bits=3, coder="scalar", rotate=False, blocks=2)
    both = torch.cat([matrix, torch.zeros(rows, hidden)], dim=1).float()
    encoded = QuantizedMatrix.encode(
        both, config, torch.float32, moments=Moments(moment.float(), torch.eye(rows))
    )
    scale = encoded._block_scales(0)[:, :1].double()
    damped = moment / moment.diagonal().mean() + 0.01 * torch.eye(hidden)
    work, rounded = matrix.clone(), torch.zeros(rows, hidden).double()
    for j in range(hidden):
        level = ((work[:, j : j + 1] / scale + 7) / 2).round().clamp(0, 7)
        rounded[:, j : j + 1] = (2 * level - 7) * scale
        done, rest = slice(0, j + 1), slice(j + 1, hidden)
        error = matrix[:, done] - rounded[:, done]
        solved = torch.linalg.solve(damped[rest, rest], damped[rest, done] @ error.T)
        work[:, rest] = matrix[:, rest] + solved.T
    torch.testing.assert_close(encoded.decode()[:, :hidden], rounded.float(), atol=1e-4, rtol=0)


def test_the_inverse_root_is_one():
    moment = _moments(12, 4).input_HH
    root = inverse_root(moment, 0.01)
    damped = moment / moment.diagonal().mean() + 0.01 * torch.eye(12)
    torch.testing.assert_close(root.T @ root @ damped, torch.eye(12), atol=1e-3, rtol=0)
    assert torch.equal(root, root.triu())
    assert torch.equal(inverse_root(torch.zeros(3, 3), 0.01), torch.eye(3))


@pytest.mark.parametrize("coder", ["scalar", "trellis"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bytes_are_as_stated(coder, bits):
    config = QuantizedConfig(bits=bits, coder=coder, group_size=32)
    matrix = torch.randn(10, 3 * 48 + 2)
    encoded = QuantizedMatrix.encode(matrix, config, torch.bfloat16)
    assert encoded.nbytes == QuantizedMatrix.stored_bytes(10, 146, config, 2)
    stream = (144 * bits + (12 - bits if coder == "trellis" else 0) + 7) // 8
    # A stream, 3 · 2 scales and two biases per row; one scale for all, six numbers of layout.
    assert encoded.nbytes == 10 * (stream + 6 + 4) + 4 + 24
    torch.testing.assert_close(encoded.decode()[:, 144:], matrix[:, 144:].bfloat16())


def test_zeros_stay_zeros():
    matrix = torch.zeros(4, 96)
    matrix[1] = torch.randn(96)
    config = QuantizedConfig(bits=2)
    decoded = QuantizedMatrix.encode(matrix, config, torch.float32).decode()
    assert torch.equal(decoded[[0, 2, 3]], torch.zeros(3, 96))
    assert float(decoded[1].norm()) > 0
    zeros = QuantizedMatrix.encode(torch.zeros(4, 96), config, torch.float32)
    assert torch.equal(zeros.decode(), torch.zeros(4, 96))


@pytest.mark.parametrize("first, count", [(0, 98), (0, 32), (32, 32), (20, 30), (90, 8), (96, 2)])
def test_columns_are_decoded_alone(first, count):
    encoded = QuantizedMatrix.encode(
        torch.randn(5, 98), QuantizedConfig(bits=3, coder="scalar"), torch.float32
    )
    torch.testing.assert_close(
        encoded.decode_columns(first, count), encoded.decode()[:, first : first + count]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["layout"].__setitem__(0, 5), "bits 5"),
        (lambda t: t["layout"].__setitem__(1, 2), "layout"),
        (lambda t: t["layout"].__setitem__(3, 31), "layout .* for 96 columns"),
        (lambda t: t["layout"].__setitem__(4, 0), "layout .* for 96 columns"),
        (lambda t: t["layout"].__setitem__(2, 0), "layout .* for 96 columns"),
        (lambda t: t.update(codes=t["codes"][:, :-1]), "codes of shape"),
        (lambda t: t.update(scales=t["scales"][:, :-1]), "scales of shape"),
        (lambda t: t.update(layout=t["layout"][:-1]), "a layout of 5 numbers"),
        (lambda t: t["codes"].__setitem__((0, -1), 255), "bits after its last entry"),
    ],
)
def test_damaged_tensors_are_refused(change, reason):
    config = QuantizedConfig(bits=3, coder="trellis")
    tensors = QuantizedMatrix.encode(torch.randn(4, 96), config, torch.float32).tensors()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)

    def read(name: str, start: int, stop: int | None) -> Tensor:
        return tensors[name][start:stop]

    with pytest.raises(ValueError, match=reason):
        QuantizedMatrix.read(read, 96, 0, 4, torch.float32)
