"""Whether a centre pays, prices of entries, and budgets that are shared over a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes, EntryWeights
from resmoe_dist.compression.budget import (
    PriceCurve,
    allocate_over_model,
    center_pays,
    centerless_keep,
)
from resmoe_dist.compression.encoding import Encoded
from resmoe_dist.compression.windows import drop_prices
from tests.compression.center_cases import in_stored_order
from tests.compression.encoding_cases import encode, every_center, kept_entries, stored_bytes


def _pruned(keep: float) -> CodecSpec:
    return CodecSpec(name="pruned", options={"keep": keep})


def _encode(experts: AlignedExperts, center: str, keep: float) -> Encoded:
    return encode(experts, center=center, keep=keep)


def _kept(encoded: Encoded) -> int:
    return sum(kept_entries(encoded))


def _exact_prices(aligned: AlignedExperts, center: str) -> Tensor:
    """The prices of all values that are not free, ascending, in float64."""
    experts = aligned.experts_EID
    if center == "joint":
        return drop_prices(experts.flatten(1)).flatten().double().sort().values
    deviation = experts.double() - (experts.double().mean(0) if center == "barycenter" else 0.0)
    return deviation.square().flatten().sort().values


@pytest.mark.parametrize(("noise", "pays"), [(None, False), (1.5, False), (0.3, True), (0, True)])
@pytest.mark.parametrize("sample_entries", [300, 1 << 19], ids=["a sample", "all entries"])
def test_centre_pays_for_similar_experts_only(noise, pays, sample_entries):
    experts = torch.randn(2, 60, 50)
    if noise is not None:
        experts = torch.randn(60, 50) + noise * experts

    sizes = BlockSizes(sample_entries=sample_entries)
    assert center_pays(in_stored_order(experts, sizes=sizes), _pruned(0.25)) is pays


@pytest.mark.parametrize("noise", [0.3, 0.8, 1.0, 1.2, 1.6, 3.0])
@pytest.mark.parametrize("count", [2, 4, 16])
def test_centre_pays_exactly_if_the_whole_group_loses_less_for_the_same_bytes(count, noise):
    aligned = in_stored_order(torch.randn(30, 40) + noise * torch.randn(count, 30, 40))

    found = center_pays(aligned, _pruned(0.25))

    joint = _encode(aligned, "joint", 0.25).squared_error
    assert found is (joint <= _encode(aligned, "none", 0.25 + 1 / count).squared_error)


def test_weighted_errors_decide_whether_a_centre_pays():
    # The similar half of the columns has almost no weight.
    experts = torch.randn(4, 40, 20)
    experts[:, :, :10] = 2 * torch.randn(40, 10)
    column_D = torch.ones(20)
    column_D[:10] = 1e-4

    weights = EntryWeights(column_D, torch.ones(40), slice(0, 0))

    assert center_pays(in_stored_order(experts), _pruned(0.2))
    assert not center_pays(in_stored_order(experts, weights), _pruned(0.2))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_without_a_centre_stores_the_same_bytes(count, keep, dtype):
    aligned = in_stored_order(torch.randn(count, 24, 40))
    more = centerless_keep(keep, count)

    joint = stored_bytes(encode(aligned, center="joint", keep=keep, dtype=dtype))
    without = stored_bytes(encode(aligned, center="none", keep=more, dtype=dtype))

    assert more <= 1
    if count > 1:
        # Each of the two shares is rounded down to whole values.
        assert abs(joint - without) <= dtype.itemsize


@every_center
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_price_curve_counts_values_above_a_price(center, scale):
    aligned = in_stored_order(torch.randn(5, 30, 40))
    exact = _exact_prices(aligned, center)

    curve = PriceCurve.of(in_stored_order(aligned.experts_EID * scale), center)

    assert (curve.values, curve.droppable) == (6000, exact.numel())
    for share in (0.01, 0.3, 0.5, 0.77, 0.99):
        price = float(exact[int(share * exact.numel())])
        more = int((exact > price).sum())
        assert curve.kept_at(price * scale**2) == pytest.approx(more, abs=3)


@every_center
def test_price_curve_of_a_sample_is_close_to_that_of_all_entries(center):
    aligned = in_stored_order(torch.randn(5, 100, 400))
    exact = _exact_prices(aligned, center)
    sizes = BlockSizes(sample_entries=5000)

    curve = PriceCurve.of(in_stored_order(aligned.experts_EID, sizes=sizes), center)

    for share in (0.1, 0.5, 0.9):
        price = float(exact[int(share * exact.numel())])
        assert curve.kept_at(price) == pytest.approx((1 - share) * exact.numel(), rel=0.05)


def test_prices_are_weighted():
    experts = torch.randn(3, 20, 30)
    weights = EntryWeights(torch.full((30,), 2.0), torch.full((20,), 4.0), slice(10, 30))
    matrix = torch.full((20, 30), 2.0)
    matrix[:, 10:] *= 4

    for center in ("joint", "barycenter", "none"):
        found = PriceCurve.of(in_stored_order(experts, weights), center)
        expected = PriceCurve.of(in_stored_order(experts * matrix), center)
        assert found.prices == pytest.approx(expected.prices, rel=1e-5, abs=1e-12)


def test_single_expert_drops_everything_for_free():
    curve = PriceCurve.of(in_stored_order(torch.randn(1, 20, 30)), "joint")

    assert (curve.values, curve.droppable) == (600, 0)
    assert curve.kept_at(0.0) == 0


def _groups() -> list[AlignedExperts]:
    """Groups of a model: of different scale, size, and likeness."""
    return [
        in_stored_order(torch.randn(4, 30, 40)),
        in_stored_order(0.2 * torch.randn(4, 30, 40)),
        in_stored_order(torch.randn(25, 40) + 0.5 * torch.randn(8, 25, 40)),
        in_stored_order(3 * torch.randn(2, 20, 40) ** 3),
    ]


def _groups_and_shares(center: str, keep: float) -> tuple[list[AlignedExperts], list[float]]:
    """Groups, and their shares of a budget of `keep` of all their entries."""
    groups = _groups()
    budgets = [keep * group.experts_EID.numel() for group in groups]
    return groups, allocate_over_model([PriceCurve.of(g, center) for g in groups], budgets)


@every_center
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_shared_budget_lowers_the_error_and_keeps_no_more(center, keep):
    groups, shares = _groups_and_shares(center, keep)

    shared = [_encode(g, center, share) for g, share in zip(groups, shares, strict=True)]
    alone = [_encode(g, center, keep) for g in groups]
    assert all(0 <= share <= 1 for share in shares)
    budget = keep * sum(group.experts_EID.numel() for group in groups)
    # Each group's share is rounded down.
    assert sum(map(_kept, alone)) - 8 <= sum(map(_kept, shared)) <= budget + 1e-6
    lost, lost_alone = (sum(e.squared_error for e in found) for found in (shared, alone))
    assert lost < 0.95 * lost_alone


@every_center
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_no_dropped_value_costs_more_than_a_kept_one_of_another_group(center, keep):
    groups, shares = _groups_and_shares(center, keep)

    dearest_dropped, cheapest_kept = [], []
    for group, share in zip(groups, shares, strict=True):
        exact = _exact_prices(group, center).tolist()
        dropped = len(exact) - round(share * group.experts_EID.numel())
        dearest_dropped += exact[:dropped][-1:]
        cheapest_kept += exact[dropped:][:1]
    # Curves have steps, and so few values are far apart.
    assert max(dearest_dropped) <= 1.05 * min(cheapest_kept)


def test_allocation_is_the_best_of_all_splits_between_two_groups():
    groups = [
        in_stored_order(torch.randn(3, 30, 50)),
        in_stored_order(0.4 * torch.randn(3, 30, 50)),
    ]
    values = 3 * 30 * 50
    shares = allocate_over_model([PriceCurve.of(g, "joint") for g in groups], [0.25 * values] * 2)

    def lost(first: float) -> float:
        kept = (first, 0.5 - first)
        return sum(
            _encode(g, "joint", keep).squared_error for g, keep in zip(groups, kept, strict=True)
        )

    least = min(lost(n / 100) for n in range(51))
    # Budgets are met up to an entry's three values.
    assert lost(shares[0]) <= 1.005 * least < 0.95 * lost(0.25)


def test_equal_curves_get_equal_shares():
    curve = PriceCurve.of(in_stored_order(torch.randn(3, 20, 30)), "joint")

    shares = allocate_over_model([curve] * 3, [0.1 * 1800, 0.2 * 1800, 0.6 * 1800])

    assert shares == pytest.approx([0.3] * 3, abs=1e-9)


def test_equal_prices_spread_the_budget_evenly():
    coarse = PriceCurve(1000, 1000, (1.0,) * 50)

    shares = allocate_over_model([coarse, coarse], [100, 300])

    assert shares == pytest.approx([0.2, 0.2])


def test_group_without_errors_leaves_its_budget_to_the_others():
    equal = PriceCurve.of(in_stored_order(torch.randn(20, 30).repeat(3, 1, 1)), "joint")
    other = PriceCurve.of(in_stored_order(torch.randn(3, 20, 30)), "joint")

    shares = allocate_over_model([equal, other], [450, 450])

    assert shares[0] == pytest.approx(0, abs=1e-3)
    assert shares[1] == pytest.approx(0.5, abs=1e-3)


def test_model_without_errors_keeps_no_more_than_its_budget():
    equal = PriceCurve.of(in_stored_order(torch.zeros(3, 20, 30)), "joint")
    alone = PriceCurve.of(in_stored_order(torch.randn(1, 20, 30)), "joint")

    shares = allocate_over_model([equal, alone], [450, 150])

    assert shares == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_budget_of_nothing_or_everything_is_the_same_for_all_groups(keep):
    groups = _groups()
    budgets = [keep * group.experts_EID.numel() for group in groups]

    shares = allocate_over_model([PriceCurve.of(g, "none") for g in groups], budgets)

    assert shares == pytest.approx([keep] * 4, abs=1e-9)


@pytest.mark.parametrize(
    ("center_share", "expected"), [(1.0, 0.5), (0.25, 0.3125), (0.0, 0.25), (4.0, 1.0)]
)
def test_budget_without_a_centre_grows_by_the_bytes_of_the_centre(center_share, expected):
    assert centerless_keep(0.25, 4, center_share) == pytest.approx(expected)
