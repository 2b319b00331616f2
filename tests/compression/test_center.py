"""The centre: brute force on small cases, the design's table on large ones."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import PrunedResidual
from resmoe_dist.codecs.bitmap import unpack_bitmap
from resmoe_dist.compression import blocks as aligned_module
from resmoe_dist.compression import center
from resmoe_dist.compression.blocks import AlignedExperts, EntryWeights
from resmoe_dist.compression.center import joint_center, mean_center
from resmoe_dist.compression.encoding import encode_group

EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)
seeds = st.integers(0, 2**32 - 1)


def _as_stored(experts: Tensor, weights: EntryWeights | None = None) -> AlignedExperts:
    """Experts whose rows are in aligned order already."""
    count, rows, _ = experts.shape
    return AlignedExperts(experts, torch.arange(rows).repeat(count, 1), weights)


def _center_and_masks(
    aligned: AlignedExperts, keep: float, name: str = "joint"
) -> tuple[Tensor, Tensor]:
    """The centre, and which entries are kept around it."""
    encoded = encode_group(
        aligned, PrunedResidual, center=name, keep=keep, allocate="group", dtype=torch.float32
    )
    columns = aligned.experts_NID.shape[2]
    masks = [unpack_bitmap(residual.bitmap, columns) for residual in encoded.residuals]
    return encoded.center_ID, torch.stack(masks)


def _squared_error(experts: Tensor, center_ID: Tensor, masks: Tensor) -> float:
    """What is lost where only masked entries have a residual, in float64."""
    lost = (experts.double() - center_ID.double()).numpy()
    return float((lost[~masks.numpy()] ** 2).sum())


def _error_around(experts: Tensor, center_ID: Tensor, keep: float) -> float:
    """What is lost where the share `keep` of the largest residuals is kept, in float64."""
    away = np.sort(((experts.double() - center_ID.double()).numpy() ** 2).ravel())
    return float(away[: away.size - int(keep * away.size)].sum())


def _least_of_entry(values: np.ndarray) -> list[float]:
    """For each number of kept values of one entry, the least spread of the others."""
    least = [np.inf] * (len(values) + 1)
    for mask in product((False, True), repeat=len(values)):
        dropped = values[~np.array(mask)]
        spread = ((dropped - dropped.mean()) ** 2).sum() if dropped.size else 0.0
        least[sum(mask)] = min(least[sum(mask)], spread)
    return least


def _least_errors(experts: Tensor) -> list[float]:
    """For each number of kept entries, the least squared error of any masks and any centre.

    Every mask of every entry is tried; entries are independent but for the budget they share.
    """
    least = {0: 0.0}
    for values in experts.double().flatten(1).T.numpy():
        totals: dict[int, float] = {}
        options = enumerate(_least_of_entry(values))
        for (kept, error), (more, spread) in product(least.items(), list(options)):
            totals[kept + more] = min(totals.get(kept + more, np.inf), error + spread)
        least = totals
    return [least[kept] for kept in sorted(least)]


def _reached_budgets(experts: Tensor) -> list[int]:
    """Numbers of kept values that one price for all entries leads to, and no ties are left over.

    At each price every entry takes the number of kept values of least spread + price · kept.
    """
    leasts = [np.array(_least_of_entry(v)) for v in experts.double().flatten(1).T.numpy()]
    # One value of each entry drops for free.
    options = [least[:-1] for least in leasts]
    slopes = {
        (option[a] - option[b]) / (b - a)
        for option in options
        for a in range(len(option))
        for b in range(a + 1, len(option))
    }
    prices = sorted(slopes | {0.0})
    between = [(a + b) / 2 for a, b in pairwise(prices) if b - a > 1e-6]
    kept = {
        sum(int(np.argmin(option + price * np.arange(len(option)))) for option in options)
        for price in [*between, prices[-1] + 1]
    }
    return sorted(kept)


@st.composite
def small_groups(draw: st.DrawFn, most_experts: int = 4, coarse: bool = True) -> Tensor:
    count, rows, columns = draw(st.integers(1, most_experts)), draw(st.integers(1, 3)), 2
    generator = torch.Generator().manual_seed(draw(seeds))
    experts = torch.randn(count, rows, columns, generator=generator)
    # Coarse values: ties between entries, and equal values within one.
    return experts.round() if coarse and draw(st.booleans()) else experts


def _weights(rows: int, columns: int, row_columns: slice, seed: int = 0) -> EntryWeights:
    generator = torch.Generator().manual_seed(seed)
    column_D = 0.1 + 2 * torch.rand(columns, generator=generator)
    return EntryWeights(column_D, 0.1 + 3 * torch.rand(rows, generator=generator), row_columns)


def _weight_matrix(weights: EntryWeights) -> Tensor:
    """The weight of every entry, one at a time."""
    within = range(len(weights.column_D))[weights.row_columns]
    return torch.tensor(
        [
            [float(c) * (float(r) if d in within else 1.0) for d, c in enumerate(weights.column_D)]
            for r in weights.row_I
        ]
    )


@given(experts=small_groups(), data=st.data())
@settings(deadline=None, max_examples=80)
def test_where_one_price_makes_the_budget_no_masks_and_centre_have_less_error(experts, data):
    kept = data.draw(st.sampled_from(_reached_budgets(experts)))

    center_ID, masks = _center_and_masks(_as_stored(experts), (kept + 0.5) / experts.numel())

    least = _least_errors(experts)[kept]
    assert int(masks.sum()) <= kept
    assert _squared_error(experts, center_ID, masks) == pytest.approx(least, rel=1e-5, abs=1e-9)


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None, max_examples=100)
def test_the_error_is_at_most_the_least_of_one_entry_less_kept(experts, keep):
    center_ID, masks = _center_and_masks(_as_stored(experts), keep)

    found, least = _squared_error(experts, center_ID, masks), _least_errors(experts)
    budget = int(keep * experts.numel())
    # An entry's N values may have to be paid at once.
    fewer = max(0, budget - len(experts) + 1)
    assert min(least[: budget + 1]) * (1 - 1e-5) - 1e-9 <= found
    assert found <= min(least[: fewer + 1]) * (1 + 1e-5) + 1e-9


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None, max_examples=100)
def test_the_share_kept_is_keep_or_all_that_is_not_zero(experts, keep):
    center_ID, masks = _center_and_masks(_as_stored(experts), keep)

    nonzero = int((experts != center_ID).sum())
    assert int(masks.sum()) == min(int(keep * experts.numel()), nonzero)


def test_coarse_weights_use_the_budget_although_most_entries_are_equal():
    # The grid of 4-bit floats, which gpt-oss comes in.
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for count in (2, 4, 8):
        experts = grid[torch.randint(8, (count, 40, 50))] * (2 * torch.randint(2, (1, 40, 50)) - 1)

        _, masks = _center_and_masks(_as_stored(experts), 0.25)

        assert int(masks.sum()) == experts.numel() // 4


def test_the_error_falls_as_more_is_kept():
    experts = torch.randn(5, 20, 30)

    errors = [
        _squared_error(experts, *_center_and_masks(_as_stored(experts), n / 40)) for n in range(41)
    ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@given(experts=small_groups())
@settings(deadline=None)
def test_with_nothing_kept_the_centre_is_the_mean(experts):
    center_ID, masks = _center_and_masks(_as_stored(experts), 0.0)

    assert not masks.any()
    mean = experts.double().mean(0)
    torch.testing.assert_close(center_ID.double(), mean, rtol=1e-6, atol=1e-7)


@given(experts=small_groups(coarse=False), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_centre_is_the_mean_of_the_values_that_are_dropped(experts, data):
    kept = data.draw(st.sampled_from(_reached_budgets(experts)))

    center_ID, masks = _center_and_masks(_as_stored(experts), (kept + 0.5) / experts.numel())

    for row, column in np.ndindex(*center_ID.shape):
        dropped = experts[:, row, column].double()[~masks[:, row, column]]
        assert len(dropped)
        assert float(center_ID[row, column]) == pytest.approx(float(dropped.mean()), abs=1e-6)


# Squared error against the plain barycentre at the same keep, in percent: the table of design.md.
TABLE = {
    2: {0.125: -45, 0.25: -74, 0.5: -100},
    4: {0.125: -26, 0.25: -50, 0.5: -88},
    8: {0.125: -13, 0.25: -28, 0.5: -66},
    16: {0.125: -6, 0.25: -15, 0.5: -43},
}


@pytest.mark.parametrize("count", TABLE)
def test_gaussian_experts_gain_what_the_design_promises(count):
    experts = torch.randn(count, 128, 250)

    for keep, percent in TABLE[count].items():
        plain = _error_around(experts, experts.double().mean(0), keep)
        joint = _squared_error(experts, *_center_and_masks(_as_stored(experts), keep))
        assert 100 * (joint / plain - 1) == pytest.approx(percent, abs=2), keep


@given(
    count=st.sampled_from([*range(1, 10), 70]),
    keep=EIGHTHS,
    value=st.floats(-(2.0**100), 2.0**100, width=32),
    copies=seeds,
)
@settings(deadline=None)
def test_equal_experts_cost_nothing(count, keep, value, copies):
    expert = torch.randn(3, 5, generator=torch.Generator().manual_seed(copies))
    expert[1, 2] = value

    center_ID, masks = _center_and_masks(_as_stored(expert.repeat(count, 1, 1)), keep)

    assert not masks.any()
    torch.testing.assert_close(center_ID, expert, rtol=1.2e-7, atol=1e-44)


def test_an_expert_alone_is_its_own_centre():
    experts = torch.randn(1, 6, 7)

    for keep in (0.0, 0.3, 1.0):
        center_ID, masks = _center_and_masks(_as_stored(experts), keep)
        assert torch.equal(center_ID, experts[0])
        assert not masks.any()


def test_rows_of_zeros_cost_nothing_and_stay_zeros():
    experts = torch.randn(4, 6, 10)
    experts[:, [0, 3, 5]] = 0

    center_ID, masks = _center_and_masks(_as_stored(experts), 0.3)

    assert not masks[:, [0, 3, 5]].any()
    assert not center_ID[[0, 3, 5]].any()
    assert int(masks.sum()) == int(0.3 * 240)


@pytest.mark.parametrize("count", [3, 70])
def test_experts_of_zeros_alone_cost_nothing(count):
    center_ID, masks = _center_and_masks(_as_stored(torch.zeros(count, 4, 5)), 0.5)

    assert not center_ID.any()
    assert not masks.any()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**66, 2.0**100])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [4, 66])
def test_the_scale_of_the_weights_changes_nothing_but_the_scale(scale, keep, count):
    experts = torch.randn(count, 16, 12)

    center_ID, masks = _center_and_masks(_as_stored(experts * scale), keep)

    expected_center, expected_masks = _center_and_masks(_as_stored(experts), keep)
    assert torch.equal(masks, expected_masks)
    assert torch.equal(center_ID, expected_center * scale)


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e9, 1e15])
@pytest.mark.parametrize("count", [2, 4])
def test_one_huge_weight_takes_no_entries_from_the_others(outlier, count):
    experts = 0.02 * torch.randn(count, 16, 12)
    expected, _ = _center_and_masks(_as_stored(experts), 0.25)
    experts[0, 0, 0] = outlier

    center_ID, masks = _center_and_masks(_as_stored(experts), 0.25)

    assert int(masks.sum()) == int(0.25 * experts.numel())
    # Another entry may have got, or given, what the outlier's has less, or more.
    assert int((center_ID != expected).sum()) <= 2


by_center = pytest.mark.parametrize(
    ("count", "name"),
    [(6, "joint"), (66, "joint"), (6, "barycenter")],
    ids=["exact", "trimmed", "barycenter"],
)
by_weights = pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
by_grid = pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])


@by_center
@by_weights
@by_grid
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_the_size_of_blocks_does_not_change_the_result(
    monkeypatch, count, name, keep, coarse, weighted
):
    experts = torch.randn(count, 13, 21)
    # Ties at the multiplier are dealt out over blocks.
    experts = experts.round() if coarse else experts
    weights = _weights(13, 21, slice(12, 21)) if weighted else None
    expected_center, expected_masks = _center_and_masks(_as_stored(experts, weights), keep, name)

    for block_rows in (1, 2, 5):
        block_values = block_rows * count * 21
        monkeypatch.setattr(aligned_module, "_BLOCK_VALUES", block_values)
        center_ID, masks = _center_and_masks(_as_stored(experts, weights), keep, name)
        assert torch.equal(center_ID, expected_center)
        assert torch.equal(masks, expected_masks)


@by_weights
@by_grid
@pytest.mark.parametrize("name", ["joint", "barycenter"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_the_size_of_samples_does_not_change_the_result(monkeypatch, name, keep, coarse, weighted):
    experts = torch.randn(6, 26, 37)
    experts = experts.round() if coarse else experts
    weights = _weights(26, 37, slice(20, 37)) if weighted else None
    expected_center, expected_masks = _center_and_masks(_as_stored(experts, weights), keep, name)

    for samples in (3, 50, 400):
        monkeypatch.setattr(aligned_module, "_SAMPLE_ENTRIES", samples)
        center_ID, masks = _center_and_masks(_as_stored(experts, weights), keep, name)
        assert torch.equal(center_ID, expected_center)
        assert torch.equal(masks, expected_masks)


@by_center
@by_weights
def test_the_number_of_threads_does_not_change_the_result(monkeypatch, count, name, weighted):
    # Enough values for threads to share the work, and a sample that is not all of them.
    rows = 200 // count + 7
    experts = torch.randn(count, rows, 1001)
    weights = _weights(rows, 1001, slice(500, 1001)) if weighted else None
    monkeypatch.setattr(aligned_module, "_SAMPLE_ENTRIES", 1 << 11)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(_center_and_masks(_as_stored(experts, weights), 0.25, name))
    finally:
        torch.set_num_threads(threads)

    for center_ID, masks in found[1:]:
        assert torch.equal(center_ID, found[0][0])
        assert torch.equal(masks, found[0][1])


@pytest.mark.parametrize("count", [1, 2, 5, 70])
@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_equal_experts_cost_nothing_with_weights_too(count, keep):
    expert = torch.randn(9, 14)

    center_ID, masks = _center_and_masks(
        _as_stored(expert.repeat(count, 1, 1), _weights(9, 14, slice(5, 14))), keep
    )

    assert not masks.any()
    torch.testing.assert_close(center_ID, expert, rtol=1.2e-7, atol=1e-44)


@given(experts=small_groups(), data=st.data(), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_no_masks_and_centre_have_less_weighted_error(experts, data, seed):
    _, rows, columns = experts.shape
    row_columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, columns)] * 2))))
    weights = _weights(rows, columns, row_columns, seed)
    matrix = _weight_matrix(weights)
    weighted = experts * matrix
    kept = data.draw(st.sampled_from(_reached_budgets(weighted)))

    found = _center_and_masks(_as_stored(experts, weights), (kept + 0.5) / experts.numel())

    least = _least_errors(weighted)[kept]
    center_ID, masks = found
    assert int(masks.sum()) <= kept
    error = _squared_error(weighted, center_ID * matrix, masks)
    assert error == pytest.approx(least, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("count", [5, 66], ids=["exact", "trimmed"])
def test_weighing_is_scaling_the_experts_and_the_centre_back(count):
    experts = torch.randn(count, 11, 13)
    # Powers of two: nothing is rounded.
    column_D = 2.0 ** torch.randint(-3, 4, (13,))
    weights = EntryWeights(column_D, 2.0 ** torch.randint(-3, 4, (11,)), slice(4, 9))
    matrix = _weight_matrix(weights)

    center_ID, masks = _center_and_masks(_as_stored(experts, weights), 0.3)

    expected_center, expected_masks = _center_and_masks(_as_stored(experts * matrix), 0.3)
    assert torch.equal(center_ID * matrix, expected_center)
    assert torch.equal(masks, expected_masks)


def test_weights_of_a_range_of_rows_are_those_of_the_matrix():
    weights = _weights(9, 12, slice(3, 8))

    found = torch.cat([weights.rows(slice(0, 4)), weights.rows(slice(4, 9))])

    torch.testing.assert_close(found, _weight_matrix(weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("block_values", [1, 300, 1 << 21])
def test_the_barycentre_is_the_mean(monkeypatch, weighted, block_values):
    monkeypatch.setattr(aligned_module, "_BLOCK_VALUES", block_values)
    experts = torch.randn(5, 14, 9)
    weights = _weights(14, 9, slice(3, 9)) if weighted else None

    found = mean_center(_as_stored(experts, weights), torch.float32)

    torch.testing.assert_close(found.double(), experts.double().mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_read_in_aligned_order_from_any_dtype(dtype):
    experts = torch.randn(4, 15, 8).to(dtype)
    perms = torch.stack([torch.randperm(15) for _ in range(4)])
    ordered = torch.stack([e[perm].float() for e, perm in zip(experts, perms, strict=True)])

    found = AlignedExperts(experts, perms)

    for keep in (0.2, 0.6):
        expected = joint_center(_as_stored(ordered), keep, torch.float32)
        assert torch.equal(joint_center(found, keep, torch.float32), expected)
    expected = mean_center(_as_stored(ordered), torch.float32)
    assert torch.equal(mean_center(found, torch.float32), expected)


def test_a_sample_is_of_every_column_and_of_the_same_entries_everywhere(monkeypatch):
    monkeypatch.setattr(aligned_module, "_SAMPLE_ENTRIES", 100)
    # The step from one sampled entry to the next would be the width of a row.
    experts = torch.arange(40 * 30).view(1, 40, 30).float().repeat(2, 1, 1)
    aligned = _as_stored(experts)

    sample = aligned.sample * aligned.unit

    assert sample.shape[1] >= 90
    assert set((sample[0].long() % 30).tolist()) == set(range(30))
    assert torch.equal(sample[0], sample[1])
    assert torch.equal(aligned.sampled(experts[0]) * aligned.unit, sample[0])


def _heavy_tailed(experts: Tensor) -> Tensor:
    return experts * experts.abs()


@pytest.mark.parametrize("tails", [torch.clone, _heavy_tailed], ids=["gaussian", "heavy tailed"])
@pytest.mark.parametrize("noise", [0.3, 1.0, None], ids=["near", "far", "unrelated"])
def test_the_trimmed_centre_is_nearly_as_good_as_the_exact_one(monkeypatch, tails, noise):
    experts = tails(torch.randn(72, 24, 32))
    if noise is not None:
        experts = torch.randn(24, 32) + noise * experts

    monkeypatch.setattr(center, "_EXACT_EXPERTS", 0)
    found = joint_center(_as_stored(experts), 0.25, torch.float32)

    monkeypatch.setattr(center, "_EXACT_EXPERTS", 72)
    exact = joint_center(_as_stored(experts), 0.25, torch.float32)
    assert _error_around(experts, found, 0.25) <= 1.01 * _error_around(experts, exact, 0.25)


@pytest.mark.parametrize("tails", [torch.clone, _heavy_tailed], ids=["gaussian", "heavy tailed"])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.25, 0.5, 0.9])
def test_the_trimmed_centre_is_never_worse_than_the_barycentre(tails, keep):
    for count in (65, 128):
        for noise in (0.2, 1.0, 3.0):
            experts = torch.randn(12, 18) + noise * tails(torch.randn(count, 12, 18))
            experts[:, :3] = 0

            found = joint_center(_as_stored(experts), keep, torch.float32)

            plain = _error_around(experts, experts.double().mean(0), keep)
            assert _error_around(experts, found, keep) <= plain * (1 + 1e-6)


def test_more_experts_than_are_centred_exactly_have_a_trimmed_centre(monkeypatch):
    experts = torch.randn(center._EXACT_EXPERTS + 1, 8, 9)
    monkeypatch.setattr(center, "windowed_center", None)

    joint_center(_as_stored(experts), 0.25, torch.float32)
