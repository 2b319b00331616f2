"""Bitmaps against `numpy.packbits`, for every remainder of D modulo 8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.codecs.bitmap import bytes_per_row, has_stray_bits, pack_bitmap, unpack_bitmap


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(0, 12)), draw(st.integers(1, 70))
    share = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.random((rows, columns)) < share


@given(masks())
@settings(deadline=None)
def test_packing_equals_numpy(mask):
    packed = pack_bitmap(torch.from_numpy(mask))

    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask, axis=1, bitorder="little"))


@given(masks())
@settings(deadline=None)
def test_unpacking_what_numpy_packed_gives_the_mask(mask):
    packed = torch.from_numpy(np.packbits(mask, axis=1, bitorder="little"))

    unpacked = unpack_bitmap(packed, mask.shape[1])

    assert unpacked.dtype == torch.bool
    np.testing.assert_array_equal(unpacked.numpy(), mask)


@pytest.mark.parametrize("columns", range(1, 18))
def test_a_row_takes_the_fewest_bytes_that_hold_it(columns):
    fewest = next(size for size in range(4) if 8 * size >= columns)

    assert bytes_per_row(columns) == fewest
    assert pack_bitmap(torch.ones(3, columns, dtype=torch.bool)).shape == (3, fewest)


@pytest.mark.parametrize("columns", range(1, 18))
def test_bits_past_the_last_column_are_zero(columns):
    packed = pack_bitmap(torch.ones(3, columns, dtype=torch.bool))

    for byte_row in packed.tolist():
        assert sum(byte.bit_count() for byte in byte_row) == columns
    assert not has_stray_bits(packed, columns)


@pytest.mark.parametrize("columns", range(1, 18))
def test_every_bit_past_the_last_column_is_noticed(columns):
    for bit in range(columns, 8 * bytes_per_row(columns)):
        packed = pack_bitmap(torch.ones(3, columns, dtype=torch.bool))
        packed[1, -1] |= 1 << bit % 8

        assert has_stray_bits(packed, columns), bit
