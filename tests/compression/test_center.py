"""The centre: brute force on small cases, the design's table on large ones, and honest errors."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import DenseResidual, LowRankResidual, PrunedResidual
from resmoe_dist.compression import center
from resmoe_dist.compression.center import encode_group, windowed_center

EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)
seeds = st.integers(0, 2**32 - 1)


def _squared_error(experts: Tensor, center_ID: Tensor, masks: Tensor) -> float:
    """What is lost where only masked entries have a residual, in float64."""
    lost = (experts.double() - center_ID.double()).numpy()
    return float((lost[~masks.numpy()] ** 2).sum())


def _least_errors(experts: Tensor) -> list[float]:
    """For each number of kept entries, the least squared error of any masks and any centre.

    Every mask of every entry is tried; entries are independent but for the budget they share.
    """
    count = experts.shape[0]
    least = {0: 0.0}
    for values in experts.double().reshape(count, -1).T.numpy():
        options = {kept: np.inf for kept in range(count + 1)}
        for mask in product((False, True), repeat=count):
            dropped = values[~np.array(mask)]
            spread = ((dropped - dropped.mean()) ** 2).sum() if dropped.size else 0.0
            options[sum(mask)] = min(options[sum(mask)], spread)
        totals: dict[int, float] = {}
        for (kept, error), (more, spread) in product(least.items(), options.items()):
            totals[kept + more] = min(totals.get(kept + more, np.inf), error + spread)
        least = totals
    return [least[kept] for kept in sorted(least)]


@st.composite
def small_groups(draw: st.DrawFn, most_experts: int = 4) -> Tensor:
    count, rows, columns = draw(st.integers(1, most_experts)), draw(st.integers(1, 3)), 2
    generator = torch.Generator().manual_seed(draw(seeds))
    experts = torch.randn(count, rows, columns, generator=generator)
    # Coarse values: ties between entries, and equal values within one.
    return experts.round() if draw(st.booleans()) else experts


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None, max_examples=150)
def test_no_masks_with_as_few_entries_have_less_error(experts, keep):
    center_ID, masks = windowed_center(experts, keep)

    least = min(_least_errors(experts)[: int(masks.sum()) + 1])
    assert _squared_error(experts, center_ID, masks) == pytest.approx(least, rel=1e-5, abs=1e-9)


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None, max_examples=150)
def test_the_share_kept_is_at_most_keep_and_short_of_it_by_less_than_one_entry(experts, keep):
    center_ID, masks = windowed_center(experts, keep)

    budget, kept = keep * experts.numel(), int(masks.sum())
    assert kept <= budget
    # Where nothing is lost there is nothing to spend on.
    free = _squared_error(experts, center_ID, masks) <= 1e-12 * float(experts.square().sum())
    assert free or budget - kept < len(experts)


def test_coarse_weights_use_the_budget_although_most_entries_are_equal():
    # The grid of 4-bit floats, which gpt-oss comes in.
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for count in (2, 4, 8):
        experts = grid[torch.randint(8, (count, 40, 50))] * (2 * torch.randint(2, (1, 40, 50)) - 1)

        _, masks = windowed_center(experts, 0.25)

        assert 0 <= 0.25 * experts.numel() - int(masks.sum()) < count


def test_the_error_falls_as_more_is_kept():
    experts = torch.randn(5, 20, 30)

    errors = [_squared_error(experts, *windowed_center(experts, n / 40)) for n in range(41)]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@given(experts=small_groups())
@settings(deadline=None)
def test_with_nothing_kept_the_centre_is_the_mean(experts):
    center_ID, masks = windowed_center(experts, 0.0)

    assert not masks.any()
    mean = experts.double().mean(0)
    torch.testing.assert_close(center_ID.double(), mean, rtol=1e-6, atol=1e-7)


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None)
def test_the_centre_is_the_mean_of_the_values_that_are_dropped(experts, keep):
    center_ID, masks = windowed_center(experts, keep)

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
    experts = torch.randn(count, 256, 300)
    residuals = (experts - experts.mean(0)).numpy()
    ordered = np.sort((residuals.astype(np.float64) ** 2).ravel())

    for keep, percent in TABLE[count].items():
        plain = ordered[: ordered.size - int(keep * ordered.size)].sum()
        joint = _squared_error(experts, *windowed_center(experts, keep))
        assert 100 * (joint / plain - 1) == pytest.approx(percent, abs=2), keep


@given(
    count=st.integers(1, 9),
    keep=EIGHTHS,
    value=st.floats(-(2.0**100), 2.0**100, width=32),
    copies=seeds,
)
@settings(deadline=None)
def test_equal_experts_cost_nothing(count, keep, value, copies):
    expert = torch.randn(3, 5, generator=torch.Generator().manual_seed(copies))
    expert[1, 2] = value
    experts = expert.repeat(count, 1, 1)

    center_ID, masks = windowed_center(experts, keep)

    assert not masks.any()
    torch.testing.assert_close(center_ID, expert, rtol=1.2e-7, atol=0)


def test_an_expert_alone_is_its_own_centre():
    experts = torch.randn(1, 6, 7)

    for keep in (0.0, 0.3, 1.0):
        center_ID, masks = windowed_center(experts, keep)
        assert torch.equal(center_ID, experts[0])
        assert not masks.any()


def test_rows_of_zeros_cost_nothing_and_stay_zeros():
    experts = torch.randn(4, 6, 10)
    experts[:, [0, 3, 5]] = 0

    center_ID, masks = windowed_center(experts, 0.3)

    assert not masks[:, [0, 3, 5]].any()
    assert not center_ID[[0, 3, 5]].any()
    assert int(masks.sum()) == int(0.3 * 240)


def test_experts_of_zeros_alone_cost_nothing():
    center_ID, masks = windowed_center(torch.zeros(3, 4, 5), 0.5)

    assert not center_ID.any()
    assert not masks.any()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**66, 2.0**100])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_the_scale_of_the_weights_changes_nothing_but_the_scale(scale, keep):
    experts = torch.randn(4, 16, 12)

    center_ID, masks = windowed_center(experts * scale, keep)

    expected_center, expected_masks = windowed_center(experts, keep)
    assert torch.equal(masks, expected_masks)
    assert torch.equal(center_ID, expected_center * scale)


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e9, 1e15])
@pytest.mark.parametrize("count", [2, 4])
def test_one_huge_weight_takes_no_entries_from_the_others(outlier, count):
    experts = 0.02 * torch.randn(count, 16, 12)
    experts[0, 0, 0] = outlier

    _, masks = windowed_center(experts, 0.25)

    assert 0 <= 0.25 * experts.numel() - int(masks.sum()) < count


@given(count=st.integers(1, 5), seed=seeds, decades=st.sampled_from([0, 8, 15]))
@settings(deadline=None)
def test_keeping_everything_restores_every_entry_to_float32_rounding(count, seed, decades):
    generator = torch.Generator().manual_seed(seed)
    # Every entry has a magnitude of its own, over so many decades.
    magnitudes = 10 ** (decades * (torch.rand(6, 7, generator=generator) - 0.5))
    experts = torch.randn(count, 6, 7, generator=generator) * magnitudes

    encoded = encode_group(experts, PrunedResidual, center="joint", keep=1.0, dtype=torch.float32)

    restored = torch.stack([encoded.center_ID + r.decode() for r in encoded.residuals])
    units = torch.finfo(torch.float32).eps * experts.abs().amax(0)
    assert bool(((restored - experts).abs() <= 2 * units).all())


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_the_size_of_chunks_does_not_change_the_result(monkeypatch, keep, coarse):
    experts = torch.randn(6, 13, 17)
    # Ties at the multiplier are dealt out over chunks.
    experts = experts.round() if coarse else experts
    expected = windowed_center(experts, keep)

    for entries in (9, 100):
        monkeypatch.setattr(center, "_CHUNK_ENTRIES", entries)
        center_ID, masks = windowed_center(experts, keep)
        assert torch.equal(center_ID, expected[0])
        assert torch.equal(masks, expected[1])


CODEC_AND_CENTER = [
    *((PrunedResidual, name) for name in ("joint", "barycenter", "mean")),
    *((LowRankResidual, name) for name in ("joint", "barycenter")),
    (DenseResidual, "joint"),
]


@pytest.mark.parametrize(("codec", "name"), CODEC_AND_CENTER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_errors_are_those_of_what_the_stored_tensors_restore(codec, name, dtype, keep):
    experts = torch.randn(3, 14, 20)

    encoded = encode_group(experts, codec, center=name, keep=keep, dtype=dtype)

    shared = 0.0 if encoded.center_ID is None else encoded.center_ID.double().numpy()
    for expert, residual, found in zip(
        experts, encoded.residuals, encoded.squared_errors, strict=True
    ):
        restored = shared + residual.decode().double().numpy()
        expected = ((expert.double().numpy() - restored) ** 2).sum()
        # Exact but for float32 differences of numbers near one.
        assert found == pytest.approx(expected, rel=1e-4, abs=expert.numel() * 1e-14)


@pytest.mark.parametrize("codec", [PrunedResidual, LowRankResidual])
def test_center_and_values_are_stored_in_the_dtype_asked_for(codec):
    experts = torch.randn(3, 14, 20)

    encoded = encode_group(experts, codec, center="joint", keep=0.5, dtype=torch.bfloat16)

    assert encoded.center_ID.dtype == torch.bfloat16
    assert {residual.decode().dtype for residual in encoded.residuals} == {torch.bfloat16}


def test_a_codec_without_a_centre_gets_none():
    encoded = encode_group(
        torch.randn(3, 4, 5), DenseResidual, center="joint", keep=0.5, dtype=torch.float32
    )

    assert encoded.center_ID is None
    assert encoded.squared_errors == [0, 0, 0]


@pytest.mark.parametrize("name", ["barycenter", "mean"])
def test_the_two_step_centre_is_the_mean_and_each_expert_keeps_its_largest_residuals(name):
    experts = torch.randn(3, 9, 11)

    encoded = encode_group(experts, PrunedResidual, center=name, keep=0.25, dtype=torch.float32)

    mean = experts.double().numpy().mean(0)
    np.testing.assert_allclose(encoded.center_ID.numpy(), mean, atol=1e-6)
    for expert, residual in zip(experts.double().numpy(), encoded.residuals, strict=True):
        exact = expert - mean
        least_kept = np.sort(np.abs(exact).ravel())[-int(0.25 * 99)]
        expected = np.where(np.abs(exact) >= least_kept, exact, 0)
        np.testing.assert_allclose(residual.decode().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["joint", "barycenter"])
def test_residuals_make_good_the_rounding_of_the_centre(name):
    # Near 1000, bfloat16 rounds by up to 2; the experts differ by a tenth.
    experts = 1000 + torch.rand(9, 14) + 0.1 * torch.randn(3, 9, 14)

    encoded = encode_group(experts, PrunedResidual, center=name, keep=1.0, dtype=torch.bfloat16)

    assert (encoded.center_ID.float() - experts.mean(0)).abs().max() > 1
    for expert, residual in zip(experts, encoded.residuals, strict=True):
        kept = residual.decode().float() != 0
        lost = (expert - encoded.center_ID.float() - residual.decode().float()).abs()
        # Half a unit in the last of 8 bits of a residual of at most 3.
        assert lost[kept].max() <= 3 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alternation_never_ends_above_the_plain_barycentre(dtype):
    for trial in range(10):
        generator = torch.Generator().manual_seed(trial)
        base = torch.randn(12, 18, generator=generator)
        experts = base + (0.1 + trial / 10) * torch.randn(4, 12, 18, generator=generator)
        for keep in (0.1, 0.4, 0.8):
            joint, plain = (
                encode_group(experts, LowRankResidual, center=name, keep=keep, dtype=dtype)
                for name in ("joint", "barycenter")
            )
            assert sum(joint.squared_errors) <= sum(plain.squared_errors)


def test_a_round_of_alternation_that_loses_is_not_returned():
    experts = torch.randn(4, 5, 6)
    shares = [0.9] * 4 + [0.1] * 4

    class Shrinking(DenseResidual):
        """Keeps a share of every entry, less in the second round."""

        uses_center = True

        @classmethod
        def encode(cls, residual_ID: Tensor, **_: object) -> DenseResidual:
            return DenseResidual(residual_ID.shape[1], {"weight": shares.pop(0) * residual_ID})

    encoded = encode_group(experts, Shrinking, center="joint", keep=0.5, dtype=torch.float32)

    assert not shares
    exact = experts - experts.mean(0)
    expected = [float((0.1 * expert).double().square().sum()) for expert in exact]
    assert encoded.squared_errors == pytest.approx(expected, rel=1e-4)


def test_alternation_finds_the_centre_from_which_every_expert_is_of_low_rank():
    # One rank apart from the base each, but from their mean six.
    base = torch.randn(12, 18)
    experts = base + torch.randn(6, 12, 1) @ torch.randn(6, 1, 18)

    joint, plain = (
        encode_group(experts, LowRankResidual, center=name, keep=0.15, dtype=torch.float32)
        for name in ("joint", "barycenter")
    )

    assert joint.residuals[0].left.shape == (12, 1)
    assert sum(joint.squared_errors) < 0.01 * sum(plain.squared_errors)
