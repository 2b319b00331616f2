"""AlignedExperts: blocks and samples in aligned order; centres do not depend on their sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes, EntryWeights
from resmoe_dist.compression.center import joint_center, mean_center
from tests.compression.center_cases import (
    center_and_masks,
    in_stored_order,
    random_weights,
    weight_matrix,
)

by_center = pytest.mark.parametrize(
    ("count", "center"),
    [(6, "joint"), (66, "joint"), (6, "barycenter")],
    ids=["exact", "trimmed", "barycenter"],
)
by_weights = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
by_grid = pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])


def _group(
    count: int, rows: int, columns: int, *, coarse: bool = False, weighted: bool
) -> tuple[Tensor, EntryWeights | None]:
    """Experts and weights. Coarse values tie at the multiplier; ties are split over blocks."""
    experts = torch.randn(count, rows, columns)
    experts = experts.round() if coarse else experts
    output_columns = slice(columns // 2, columns)
    return experts, random_weights(rows, columns, output_columns) if weighted else None


def _assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Assert that centres and masks are bit-identical."""
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@by_center
@by_weights
@by_grid
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_centre_does_not_depend_on_the_block_size(count, center, keep, coarse, weighted):
    experts, weights = _group(count, 13, 21, coarse=coarse, weighted=weighted)
    expected = center_and_masks(in_stored_order(experts, weights), keep, center)

    for block_rows in (1, 2, 5):
        sizes = BlockSizes(block_values=block_rows * count * 21)
        found = center_and_masks(in_stored_order(experts, weights, sizes), keep, center)
        _assert_same(found, expected)


@by_weights
@by_grid
@pytest.mark.parametrize("center", ["joint", "barycenter"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_centre_does_not_depend_on_the_sample_size(center, keep, coarse, weighted):
    experts, weights = _group(6, 26, 37, coarse=coarse, weighted=weighted)
    expected = center_and_masks(in_stored_order(experts, weights), keep, center)

    for sample_entries in (3, 50, 400):
        sizes = BlockSizes(sample_entries=sample_entries)
        found = center_and_masks(in_stored_order(experts, weights, sizes), keep, center)
        _assert_same(found, expected)


@by_center
@by_weights
def test_centre_does_not_depend_on_the_number_of_threads(set_threads, count, center, weighted):
    # Enough values for several blocks, and a sample of only some of them.
    experts, weights = _group(count, 200 // count + 7, 1001, weighted=weighted)
    sizes = BlockSizes(sample_entries=1 << 11)
    found = []
    for threads in (1, 2, 4):
        set_threads(threads)
        found.append(center_and_masks(in_stored_order(experts, weights, sizes), 0.25, center))

    for other in found[1:]:
        _assert_same(other, found[0])


@by_weights
@pytest.mark.parametrize("block_values", [1, 300, 1 << 21])
def test_mean_centre_is_the_mean(weighted, block_values):
    experts, weights = _group(5, 14, 9, weighted=weighted)

    sizes = BlockSizes(block_values=block_values)
    found = mean_center(in_stored_order(experts, weights, sizes), torch.float32)

    torch.testing.assert_close(found.double(), experts.double().mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_any_dtype_are_read_in_aligned_order(dtype):
    experts = torch.randn(4, 15, 8).to(dtype)
    perms = torch.stack([torch.randperm(15) for _ in range(4)])
    ordered = torch.stack([e[perm].float() for e, perm in zip(experts, perms, strict=True)])

    found = AlignedExperts(experts, perms)

    for keep in (0.2, 0.6):
        expected = joint_center(in_stored_order(ordered), keep, torch.float32)
        assert torch.equal(joint_center(found, keep, torch.float32), expected)
    expected = mean_center(in_stored_order(ordered), torch.float32)
    assert torch.equal(mean_center(found, torch.float32), expected)


def test_sample_covers_every_column_and_has_the_same_entries_of_every_expert():
    # Without the correction, the step between sampled entries would be the width of a row.
    experts = torch.arange(40 * 30).view(1, 40, 30).float().repeat(2, 1, 1)
    group = in_stored_order(experts, sizes=BlockSizes(sample_entries=100))

    sample = group.sample * group.scale

    assert sample.shape[1] >= 90
    assert set((sample[0].long() % 30).tolist()) == set(range(30))
    assert torch.equal(sample[0], sample[1])
    assert torch.equal(group.sample_of(experts[0]) * group.scale, sample[0])


def test_weights_of_row_ranges_match_the_whole_matrix():
    weights = random_weights(9, 12, slice(3, 8))

    found = torch.cat([weights.block(slice(0, 4)), weights.block(slice(4, 9))])

    torch.testing.assert_close(found, weight_matrix(weights), rtol=1e-6, atol=0)
