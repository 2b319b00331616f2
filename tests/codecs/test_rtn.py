"""`rtn`: integers, scales and zero points, their bytes, and what a damaged file says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization import PerChannelMinMaxObserver

from resmoe_dist.codecs import CodecSpec, RtnConfig, RtnMatrix
from resmoe_dist.codecs.rtn import pack_planes, round_to_nearest, unpack_planes

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def _encode(matrix: Tensor, dtype: torch.dtype = torch.float32, **options: int) -> RtnMatrix:
    return RtnMatrix.encode(matrix, RtnConfig(**options), dtype)


def test_integers_scales_and_zero_points_by_hand():
    # Two groups: 0 to 3 in steps of 1, and −4 to 2 in steps of 2.
    row = [0.0, 1, 2, 3, 1, 0.4, 2.6, 0, -4, 2, 0, -2, 0.9, 1.2, -3.2, 0]

    found = _encode(torch.tensor([row]), bits=2, group_size=8)

    assert found.scales.tolist() == [[1.0, 2.0]]
    assert unpack_planes(found.zero_points, 2).tolist() == [[0, 2]]
    integers = unpack_planes(found.integers, 8).tolist()
    assert integers == [[[0, 1, 2, 3, 1, 0, 3, 0], [0, 3, 2, 1, 2, 3, 0, 2]]]
    expected = [0.0, 1, 2, 3, 1, 0, 3, 0, -4, 2, 0, -2, 0, 2, -4, 0]
    assert found.decode().tolist() == [expected]


@every_width
@pytest.mark.parametrize("columns", [64, 70, 5])
def test_errors_are_at_most_half_a_step(bits, columns):
    matrix = torch.randn(6, columns)

    lost = (_encode(matrix, bits=bits, group_size=16).decode() - matrix).abs()

    for part, errors in zip(matrix.split(16, 1), lost.split(16, 1), strict=True):
        steps = part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)
        step = steps / (2**bits - 1)
        assert (errors.amax(1) <= 0.5001 * step).all()
        # Not better by storing something else.
        assert bits == 8 or columns == 5 or errors.max() > 0.3 * step.min()


@every_width
def test_zeros_stay_zeros(bits):
    matrix = torch.randn(4, 40)
    matrix[1] = 0
    matrix[:, ::3] = 0

    decoded = _encode(matrix, bits=bits).decode()

    assert bool((decoded[matrix == 0] == 0).all())


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "bits_per_entry"),
    # Integers, 16 bits of scale, and a zero point as wide as an integer.
    [
        (3, 64, 512, 3 + (16 + 3) / 64),
        (8, 64, 512, 8 + (16 + 8) / 64),
        (4, 128, 1024, 4 + (16 + 4) / 128),
        # One group of 64 for 10 columns; the zero point takes a byte for each of its bits.
        (2, 64, 10, (2 * 64 + 16 + 2 * 8) / 10),
    ],
)
def test_every_bit_is_counted_and_none_is_wasted(bits, group_size, columns, bits_per_entry):
    encoded = _encode(torch.randn(5, columns), torch.bfloat16, bits=bits, group_size=group_size)

    assert 8 * encoded.nbytes == pytest.approx(5 * columns * bits_per_entry)
    kinds = encoded.bytes_by_kind()
    groups = -(-columns // group_size)
    assert kinds["values"] == 5 * groups * group_size * bits // 8


@every_width
@pytest.mark.parametrize("count", [1, 7, 8, 19])
def test_planes_hold_the_bits_that_numpy_packs(bits, count):
    integers = torch.randint(0, 2**bits, (3, 2, count), dtype=torch.uint8)

    packed = pack_planes(integers, bits)

    bit_arrays = [integers.numpy() >> p & 1 for p in range(bits)]
    expected = [np.packbits(each, axis=-1, bitorder="little") for each in bit_arrays]
    np.testing.assert_array_equal(packed.numpy(), np.stack(expected, axis=-2))
    assert torch.equal(unpack_planes(packed, count), integers)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 1}, "codec rtn: bits 1: must be 2 or more"),
        ({"bits": 9}, "codec rtn: bits 9: must be 8 or less"),
        ({"group_size": 12}, "codec rtn: group_size 12: must be a multiple of 8"),
        ({"group_size": 0}, "codec rtn: group_size 0: must be 8 or more"),
    ],
)
def test_wrong_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        CodecSpec(name="rtn", options=options)


@every_width
def test_integers_are_those_of_torch(bits):
    groups = torch.randn(50, 32) * torch.rand(50, 1)
    groups[3] = groups[3].abs() + 1
    largest = 2**bits - 1

    integers, scales, zero_points = round_to_nearest(groups, bits, torch.float32)

    observer = PerChannelMinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_channel_affine, quant_min=0, quant_max=largest
    )
    observer(groups)
    expected_scales, expected_zero_points = observer.calculate_qparams()
    torch.testing.assert_close(scales, expected_scales)
    assert zero_points.tolist() == expected_zero_points.tolist()
    found = (integers.float() - zero_points.unsqueeze(1)) * scales.unsqueeze(1)
    expected = torch.fake_quantize_per_channel_affine(
        groups, expected_scales, expected_zero_points.int(), 0, 0, largest
    )
    torch.testing.assert_close(found, expected)


@every_width
def test_integers_are_those_of_torchao(bits):
    torchao = pytest.importorskip("torchao.quantization")
    groups, largest = torch.randn(400, 64), 2**bits - 1

    found = round_to_nearest(groups, bits, torch.float32)

    scales, zero_points = torchao.choose_qparams_affine(
        groups,
        torchao.MappingType.ASYMMETRIC,
        (1, 64),
        torch.uint8,
        quant_min=0,
        quant_max=largest,
        zero_point_dtype=torch.uint8,
    )
    integers = torchao.quantize_affine(
        groups, (1, 64), scales, zero_points, torch.uint8, 0, largest
    )
    assert torch.equal(found[0], integers)
    torch.testing.assert_close(found[1], scales.flatten())
    assert torch.equal(found[2], zero_points.flatten())


def test_groups_too_small_for_the_dtype_become_zeros():
    matrix = torch.full((1, 16), 1e-9)
    matrix[0, 8:] = 1.0

    decoded = _encode(matrix, torch.float16, bits=8, group_size=8).decode()

    assert decoded.tolist() == [[0.0] * 8 + [1.0] * 8]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"integers": torch.zeros(2, 3, 4, 2, dtype=torch.uint8)}, "3 groups of 4 planes of 2"),
        ({"integers": torch.zeros(2, 2, 9, 2, dtype=torch.uint8)}, "2 groups of 9 planes"),
        ({"integers": torch.zeros(2, 2, 3, 2, dtype=torch.uint8)}, "zero points of shape"),
        ({"scales": torch.ones(2, 1)}, "1 scales for 2 groups"),
        ({"zero_points": torch.zeros(2, 4, dtype=torch.uint8)}, "numbers of dimensions"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(changes: dict[str, Any], reason):
    tensors = _encode(torch.randn(2, 24), group_size=16).tensors() | changes

    def read(name: str, start: int, stop: int | None) -> Tensor:
        return tensors[name][start:stop]

    with pytest.raises(ValueError, match=reason):
        RtnMatrix.read(read, 24, 0, 2, torch.float32)
