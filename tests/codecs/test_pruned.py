"""`pruned` against a naive top-k mask in NumPy, and what its reader refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.codecs import PrunedConfig, PrunedMatrix
from resmoe_dist.codecs.pruned import largest_entries, row_offsets_of

EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)  # exact in binary: ⌊keep·I·D⌋ has no rounding


def _encode(
    matrix: torch.Tensor,
    keep: float,
    dtype: torch.dtype = torch.float32,
    mask: torch.Tensor | None = None,
) -> PrunedMatrix:
    return PrunedMatrix.encode(matrix, PrunedConfig(keep=keep), dtype, mask)


@st.composite
def residuals(draw: st.DrawFn) -> torch.Tensor:
    """A residual of any small shape whose magnitudes all differ, also as bfloat16 values do."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 21))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    magnitudes = rng.permutation(rows * columns) + 1.0
    signs = rng.choice([-1.0, 1.0], rows * columns)
    return torch.from_numpy((magnitudes * signs).reshape(rows, columns)).float() / 64


def _naive_top_k(residual: torch.Tensor, keep: float) -> torch.Tensor:
    flat = residual.numpy().ravel().tolist()
    wanted = int(np.floor(keep * len(flat)))
    best = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[:wanted]
    return torch.tensor([v if i in best else 0.0 for i, v in enumerate(flat)]).view_as(residual)


@given(residual=residuals(), keep=EIGHTHS)
@settings(deadline=None)
def test_decoding_gives_the_entries_of_largest_magnitude_and_zeros(residual, keep):
    encoded = _encode(residual, keep)

    assert torch.equal(encoded.decode(), _naive_top_k(residual, keep))


@given(residual=residuals(), keep=EIGHTHS)
@settings(deadline=None)
def test_share_is_exact_for_equal_magnitudes(residual, keep):
    equal = residual.sign()

    encoded = _encode(equal, keep)

    assert encoded.values.numel() == int(encoded.decode().count_nonzero())
    assert encoded.values.numel() == residual.numel() * round(8 * keep) // 8


def test_larger_entries_are_kept_before_equal_ones():
    residual = torch.randint(-3, 4, (9, 11)).float()

    for kept_share in (0.1, 0.4, 0.7):
        mask = largest_entries(residual, kept_share)
        assert residual[mask].abs().min() >= residual[~mask].abs().max()


@given(residual=residuals(), seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0, 0.3, 1]))
@settings(deadline=None)
def test_given_mask_replaces_the_budget(residual, seed, share):
    mask = torch.from_numpy(np.random.default_rng(seed).random(residual.shape) < share)

    encoded = _encode(residual, 0.5, mask=mask)

    expected = np.where(mask.numpy(), residual.numpy(), 0)
    np.testing.assert_array_equal(encoded.decode().numpy(), expected)


def test_nothing_kept_stores_no_values():
    encoded = _encode(torch.randn(5, 11), 0.0)

    assert encoded.values.numel() == 0
    assert torch.equal(encoded.decode(), torch.zeros(5, 11))


def test_everything_kept_is_the_residual_itself():
    residual = torch.randn(5, 11)

    encoded = _encode(residual, 1.0)

    assert torch.equal(encoded.decode(), residual)


def test_rows_with_no_kept_entry_decode_to_zeros_between_others():
    residual = torch.zeros(6, 9)
    residual[1, 8], residual[4, 0] = 3.0, -2.0  # rows 0, 2, 3 and 5 are empty

    encoded = _encode(residual, 2 / 54)

    assert torch.equal(encoded.decode(), residual)
    assert encoded.row_offsets.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_values_are_rounded_to_the_stored_dtype():
    residual = torch.randn(7, 13)

    encoded = _encode(residual, 1.0, torch.bfloat16)

    assert encoded.values.dtype == encoded.decode().dtype == torch.bfloat16
    assert torch.equal(encoded.decode(), residual.bfloat16())


def test_entries_are_chosen_before_rounding():
    residual = torch.tensor([[1.0, 1.0001, 1.0002, -1.0003]])  # all 1 in bfloat16

    encoded = _encode(residual, 0.5, torch.bfloat16)

    assert encoded.decode().tolist() == [[0, 0, 1, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "kept"), [(7, 13, 22), (1, 1, 0), (3, 8, 6)])
def test_bytes_are_the_sum_of_bitmap_values_and_offsets(rows, columns, kept, dtype):
    residual = torch.randn(rows, columns)
    share = (kept + 0.5) / residual.numel()

    encoded = _encode(residual, share, dtype)

    bitmap_bytes = rows * ((columns + 7) // 8)
    value_bytes = kept * (4 if dtype is torch.float32 else 2)
    offset_bytes = (rows + 1) * 4
    assert encoded.nbytes == bitmap_bytes + value_bytes + offset_bytes


def _reader(tensors: dict[str, torch.Tensor]):
    return lambda name, start, stop: tensors[name][start:stop]


def _stored(keep: float = 0.4) -> dict[str, torch.Tensor]:
    encoded = _encode(torch.randn(6, 13), keep)
    return {name: tensor.clone() for name, tensor in encoded.tensors().items()}


def test_reader_notices_any_flipped_bit_of_its_rows():
    tensors = _stored()
    for row, byte in np.ndindex(*tensors["bitmap"].shape):
        for bit in range(8):
            tensors["bitmap"][row, byte] ^= 1 << bit
            with pytest.raises(ValueError, match="bitmap"):
                PrunedMatrix.read(_reader(tensors), 13, row, row + 1, torch.float32)
            tensors["bitmap"][row, byte] ^= 1 << bit
    PrunedMatrix.read(_reader(tensors), 13, 0, 6, torch.float32)


def test_a_bit_moved_past_the_last_column_is_noticed():
    tensors = _stored(keep=1.0)
    assert tensors["bitmap"][2].tolist() == [0b11111111, 0b00011111]
    tensors["bitmap"][2, 1] = 0b10001111  # as many bits as before

    with pytest.raises(ValueError, match="past column 13"):
        PrunedMatrix.read(_reader(tensors), 13, 0, 6, torch.float32)


@pytest.mark.parametrize("row", range(7))
@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_a_wrong_offset_is_noticed(row, change):
    tensors = _stored()
    tensors["row_offsets"][row] += change

    with pytest.raises(ValueError, match="offsets"):
        PrunedMatrix.read(_reader(tensors), 13, 0, 6, torch.float32)


@pytest.mark.parametrize("change", [-1, 1])
def test_reader_of_all_rows_notices_shifted_offsets(change):
    tensors = _stored()
    tensors["row_offsets"] += change

    with pytest.raises(ValueError, match="offsets"):
        PrunedMatrix.read(_reader(tensors), 13, 0, 6, torch.float32)


def test_missing_values_are_noticed():
    tensors = _stored()
    tensors["values"] = tensors["values"][:-1]

    with pytest.raises(ValueError, match="values"):
        PrunedMatrix.read(_reader(tensors), 13, 0, 6, torch.float32)


def test_reader_reads_only_the_rows_and_values_of_its_range():
    tensors = _stored()
    asked = {}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        asked[name] = (start, stop)
        return tensors[name][start:stop]

    PrunedMatrix.read(read, 13, 2, 5, torch.float32)

    first, last = tensors["row_offsets"][[2, 5]].tolist()
    assert asked == {"row_offsets": (2, 6), "bitmap": (2, 5), "values": (first, last)}


@given(residual=residuals(), keep=EIGHTHS, data=st.data())
@settings(deadline=None)
def test_joining_slices_gives_the_tensors_of_the_whole(residual, keep, data):
    encoded = _encode(residual, keep, torch.bfloat16)
    rows = residual.shape[0]
    # Also none, and parts of no rows.
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    bounds = zip([0, *cuts], [*cuts, rows], strict=True)

    joined = PrunedMatrix.join_rows([encoded.slice_rows(*bound) for bound in bounds])

    assert joined.columns == encoded.columns
    for name, tensor in encoded.tensors().items():
        found = joined.tensors()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


@given(residual=residuals(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_joining_encoded_parts_equals_encoding_the_whole(residual, seed):
    mask = torch.from_numpy(np.random.default_rng(seed).random(residual.shape) < 0.4)

    def encode(rows: slice) -> PrunedMatrix:
        return _encode(residual[rows], 0.4, mask=mask[rows])

    joined = PrunedMatrix.join_rows([encode(slice(0, 2)), encode(slice(2, None))])

    for name, tensor in encode(slice(None)).tensors().items():
        assert torch.equal(joined.tensors()[name], tensor), name


def test_offsets_have_64_bits_from_2_to_the_31_values_on():
    largest = 2**31 - 1

    few, many = (row_offsets_of(torch.tensor([largest - 5, last])) for last in (5, 6))

    assert (few.dtype, few.tolist()) == (torch.int32, [0, largest - 5, largest])
    assert (many.dtype, many.tolist()) == (torch.int64, [0, largest - 5, largest + 1])


@given(residual=residuals(), keep=st.floats(0, 1))
@settings(deadline=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_exceed_the_stored_ones_by_at_most_one_value(residual, keep, dtype):
    encoded = _encode(residual, keep, dtype)

    predicted = PrunedMatrix.stored_bytes(*residual.shape, PrunedConfig(keep=keep), dtype.itemsize)
    assert encoded.nbytes <= predicted <= encoded.nbytes + dtype.itemsize


def test_predicted_bytes_include_64_bit_offsets():
    rows, columns = 2**16, 2**16

    half, less = (
        PrunedMatrix.stored_bytes(rows, columns, PrunedConfig(keep=keep), 2)
        for keep in (0.5, 0.5 - 2**-32)
    )

    assert less == rows * columns // 8 + (2**31 - 1) * 2 + (rows + 1) * 4
    assert half == rows * columns // 8 + 2**31 * 2 + (rows + 1) * 8
