"""Bytes that are predicted before encoding, and budgets that meet a target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.compression.stored_size import StoredSize, keep_for
from tests.compression.center_cases import in_stored_order
from tests.compression.encoding_cases import codec_spec, encode, every_allocation, stored_bytes

CODECS = ["pruned", "low_rank", "dense"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("center", ["joint", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_allocation
def test_predicted_bytes_bound_the_stored_ones_closely(codec, center, dtype, allocate):
    for count, rows, columns in ((1, 40, 60), (3, 31, 53), (8, 24, 75)):
        aligned = in_stored_order(torch.randn(count, rows, columns))
        center_codec = None if center == "none" else DENSE
        spec = CodecSpec(name=codec)
        size = StoredSize(count, rows, columns, dtype.itemsize, spec, center_codec, bias_bytes=128)
        for keep in (0.0, 0.1, 0.2575, 0.4):
            found = encode(aligned, codec, center=center, keep=keep, allocate=allocate, dtype=dtype)
            actual = stored_bytes(found) + 128 * count
            if count == 1 and center_codec and codec == "pruned":
                # A single expert equals its centre: its residual is zero, whatever the budget.
                assert actual <= size.bytes_at(keep)
                continue
            rounding = count * dtype.itemsize
            assert actual <= size.bytes_at(keep) <= 1.001 * actual + rounding, (count, keep)


@pytest.mark.parametrize("center_codec", ["rounded", "low_rank"])
def test_centre_counts_with_the_bytes_of_its_codec(center_codec):
    found = encode(torch.randn(3, 24, 40), "dense", center="mean", center_codec=center_codec)

    size = StoredSize(3, 24, 40, 4, DENSE, codec_spec(center_codec, 0.25))

    assert size.center_bytes_at(None) == found.center.nbytes < 24 * 40 * 4
    assert size.bytes_at(None) == stored_bytes(found)


def test_dense_bytes_leave_the_codecs_out():
    size = StoredSize(3, 24, 40, 2, CodecSpec(name="pruned"), DENSE, bias_bytes=100)

    assert size.dense_bytes == 3 * (24 * 40 * 2 + 100)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    codec=st.sampled_from(CODECS),
    center_codec=st.sampled_from([None, DENSE, CodecSpec(name="rounded")]),
    share=st.floats(0, 1.2),
)
@settings(deadline=None, max_examples=50)
def test_largest_keep_within_a_target_is_found(counts, rows, columns, codec, center_codec, share):
    sizes = [
        StoredSize(count, rows, columns, 2, CodecSpec(name=codec), center_codec) for count in counts
    ]

    def total_bytes(keep: float) -> int:
        return sum(size.bytes_at(keep) for size in sizes)

    target = total_bytes(0.0) + share * (total_bytes(1.0) - total_bytes(0.0))

    found = keep_for(target, total_bytes)

    fitting = [n / 1000 for n in range(1001) if total_bytes(n / 1000) <= target]
    assert found >= max(fitting)
    assert total_bytes(found) <= target
    assert found == 1 or total_bytes(min(1.0, found + 1e-9)) > target


def _pruned_size(bias_bytes: int = 0) -> StoredSize:
    return StoredSize(4, 20, 30, 2, CodecSpec(name="pruned"), DENSE, bias_bytes=bias_bytes)


def test_target_below_the_bytes_of_keeping_nothing_cannot_be_met():
    size = _pruned_size(bias_bytes=25)

    assert keep_for(size.bytes_at(0.0) - 1, size.bytes_at) is None
    assert keep_for(size.bytes_at(0.0), size.bytes_at) is not None


def test_target_that_holds_everything_keeps_everything():
    size = _pruned_size()

    assert keep_for(size.bytes_at(1.0), size.bytes_at) == 1
