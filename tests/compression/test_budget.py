"""Budgets against brute force, exact counts, and what real groups lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import DenseResidual, EncodedResidual, LowRankResidual, PrunedResidual
from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes, EntryWeights
from resmoe_dist.compression.budget import (
    PriceCurve,
    StoredSize,
    allocate_over_model,
    center_pays,
    centerless_keep,
    keep_for,
)
from resmoe_dist.compression.encoding import Encoded, encode_group
from resmoe_dist.compression.windows import drop_prices

DEFAULT_SIZES = BlockSizes()
every_center = pytest.mark.parametrize("center", ["joint", "barycenter", "none"])


def _as_stored(
    experts: Tensor, weights: EntryWeights | None = None, sizes: BlockSizes = DEFAULT_SIZES
) -> AlignedExperts:
    """Experts whose rows are in aligned order already."""
    count, rows, _ = experts.shape
    return AlignedExperts(experts, torch.arange(rows).repeat(count, 1), weights, sizes=sizes)


def _encode(
    aligned: AlignedExperts,
    center: str,
    keep: float,
    *,
    codec: type[EncodedResidual] = PrunedResidual,
    allocate: str = "group",
    dtype: torch.dtype = torch.float32,
) -> Encoded:
    return encode_group(aligned, codec, center=center, keep=keep, allocate=allocate, dtype=dtype)


def _nbytes(encoded: Encoded) -> int:
    center = 0 if encoded.center_ID is None else encoded.center_ID.nbytes
    return center + sum(residual.nbytes for residual in encoded.residuals)


def _kept(encoded: Encoded) -> int:
    return sum(residual.values.numel() for residual in encoded.residuals)


def _exact_prices(aligned: AlignedExperts, center: str) -> Tensor:
    """The price of every value that has one, ascending, in float64."""
    experts = aligned.experts_EID
    if center == "joint":
        return drop_prices(experts.flatten(1)).flatten().double().sort().values
    away = experts.double() - (experts.double().mean(0) if center == "barycenter" else 0.0)
    return away.square().flatten().sort().values


@pytest.mark.parametrize(("noise", "pays"), [(None, False), (1.5, False), (0.3, True), (0, True)])
@pytest.mark.parametrize("sample_entries", [300, 1 << 19], ids=["a sample", "all entries"])
def test_a_centre_pays_for_experts_that_have_much_in_common(noise, pays, sample_entries):
    experts = torch.randn(2, 60, 50)
    if noise is not None:
        experts = torch.randn(60, 50) + noise * experts

    sizes = BlockSizes(sample_entries=sample_entries)
    assert center_pays(_as_stored(experts, sizes=sizes), 0.25) is pays


@pytest.mark.parametrize("noise", [0.3, 0.8, 1.0, 1.2, 1.6, 3.0])
@pytest.mark.parametrize("count", [2, 4, 16])
def test_a_centre_pays_where_the_whole_group_loses_less_with_it_for_the_same_bytes(count, noise):
    aligned = _as_stored(torch.randn(30, 40) + noise * torch.randn(count, 30, 40))

    found = center_pays(aligned, 0.25)

    joint = _encode(aligned, "joint", 0.25).squared_error
    assert found is (joint <= _encode(aligned, "none", 0.25 + 1 / count).squared_error)


def test_whether_a_centre_pays_is_judged_by_weighted_errors():
    # What is alike counts for nothing.
    experts = torch.randn(4, 40, 20)
    experts[:, :, :10] = 2 * torch.randn(40, 10)
    column_D = torch.ones(20)
    column_D[:10] = 1e-4

    weights = EntryWeights(column_D, torch.ones(40), slice(0, 0))

    assert center_pays(_as_stored(experts), 0.2)
    assert not center_pays(_as_stored(experts, weights), 0.2)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_centre_as_many_bytes_are_stored(count, keep, dtype):
    aligned = _as_stored(torch.randn(count, 24, 40))
    more = centerless_keep(keep, count)

    joint = _nbytes(_encode(aligned, "joint", keep, dtype=dtype))
    without = _nbytes(_encode(aligned, "none", more, dtype=dtype))

    assert more <= 1
    if count > 1:
        # Each of the two shares is rounded down to whole values.
        assert abs(joint - without) <= dtype.itemsize


@every_center
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_price_curve_tells_how_many_values_cost_more_than_a_price(center, scale):
    aligned = _as_stored(torch.randn(5, 30, 40))
    exact = _exact_prices(aligned, center)

    curve = PriceCurve.of(_as_stored(aligned.experts_EID * scale), center)

    assert (curve.values, curve.droppable) == (6000, exact.numel())
    for share in (0.01, 0.3, 0.5, 0.77, 0.99):
        price = float(exact[int(share * exact.numel())])
        more = int((exact > price).sum())
        assert curve.kept_at(price * scale**2) == pytest.approx(more, abs=3)


@every_center
def test_a_price_curve_of_a_sample_is_nearly_that_of_all(center):
    aligned = _as_stored(torch.randn(5, 100, 400))
    exact = _exact_prices(aligned, center)
    sizes = BlockSizes(sample_entries=5000)

    curve = PriceCurve.of(_as_stored(aligned.experts_EID, sizes=sizes), center)

    for share in (0.1, 0.5, 0.9):
        price = float(exact[int(share * exact.numel())])
        assert curve.kept_at(price) == pytest.approx((1 - share) * exact.numel(), rel=0.05)


def test_prices_are_weighted():
    experts = torch.randn(3, 20, 30)
    weights = EntryWeights(torch.full((30,), 2.0), torch.full((20,), 4.0), slice(10, 30))
    matrix = torch.full((20, 30), 2.0)
    matrix[:, 10:] *= 4

    for center in ("joint", "barycenter", "none"):
        found = PriceCurve.of(_as_stored(experts, weights), center)
        expected = PriceCurve.of(_as_stored(experts * matrix), center)
        assert found.prices == pytest.approx(expected.prices, rel=1e-5, abs=1e-12)


def test_an_expert_alone_drops_everything_for_free():
    curve = PriceCurve.of(_as_stored(torch.randn(1, 20, 30)), "joint")

    assert (curve.values, curve.droppable) == (600, 0)
    assert curve.kept_at(0.0) == 0


def _groups() -> list[AlignedExperts]:
    """Groups of a model: of different scale, size, and likeness."""
    return [
        _as_stored(torch.randn(4, 30, 40)),
        _as_stored(0.2 * torch.randn(4, 30, 40)),
        _as_stored(torch.randn(25, 40) + 0.5 * torch.randn(8, 25, 40)),
        _as_stored(3 * torch.randn(2, 20, 40) ** 3),
    ]


@every_center
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_sharing_budgets_over_the_model_lowers_the_error_and_keeps_no_more(center, keep):
    groups = _groups()
    budgets = [keep * group.experts_EID.numel() for group in groups]

    shares = allocate_over_model([PriceCurve.of(g, center) for g in groups], budgets)

    shared = [_encode(g, center, share) for g, share in zip(groups, shares, strict=True)]
    alone = [_encode(g, center, keep) for g in groups]
    assert all(0 <= share <= 1 for share in shares)
    # Each group's share is rounded down.
    assert sum(map(_kept, alone)) - 8 <= sum(map(_kept, shared)) <= sum(budgets) + 1e-6
    lost, lost_alone = (sum(e.squared_error for e in found) for found in (shared, alone))
    assert lost < 0.95 * lost_alone


@every_center
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_nothing_is_dropped_in_one_group_for_more_than_is_kept_for_in_another(center, keep):
    groups = _groups()
    budgets = [keep * group.experts_EID.numel() for group in groups]

    shares = allocate_over_model([PriceCurve.of(g, center) for g in groups], budgets)

    dearest_dropped, cheapest_kept = [], []
    for group, share in zip(groups, shares, strict=True):
        exact = _exact_prices(group, center).tolist()
        dropped = len(exact) - round(share * group.experts_EID.numel())
        dearest_dropped += exact[:dropped][-1:]
        cheapest_kept += exact[dropped:][:1]
    # Curves have steps, and so few values are far apart.
    assert max(dearest_dropped) <= 1.05 * min(cheapest_kept)


def test_no_other_shares_of_two_groups_lose_less():
    groups = [_as_stored(torch.randn(3, 30, 50)), _as_stored(0.4 * torch.randn(3, 30, 50))]
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


def test_equal_curves_have_equal_shares_whatever_each_would_keep_alone():
    curve = PriceCurve.of(_as_stored(torch.randn(3, 20, 30)), "joint")

    shares = allocate_over_model([curve] * 3, [0.1 * 1800, 0.2 * 1800, 0.6 * 1800])

    assert shares == pytest.approx([0.3] * 3, abs=1e-9)


def test_a_model_of_equal_prices_spreads_its_budget_evenly():
    coarse = PriceCurve(1000, 1000, (1.0,) * 50)

    shares = allocate_over_model([coarse, coarse], [100, 300])

    assert shares == pytest.approx([0.2, 0.2])


def test_a_group_that_costs_nothing_leaves_its_budget_to_the_others():
    equal = PriceCurve.of(_as_stored(torch.randn(20, 30).repeat(3, 1, 1)), "joint")
    other = PriceCurve.of(_as_stored(torch.randn(3, 20, 30)), "joint")

    shares = allocate_over_model([equal, other], [450, 450])

    assert shares[0] == pytest.approx(0, abs=1e-3)
    assert shares[1] == pytest.approx(0.5, abs=1e-3)


def test_a_model_that_costs_nothing_keeps_no_more_than_its_budget():
    equal = PriceCurve.of(_as_stored(torch.zeros(3, 20, 30)), "joint")
    alone = PriceCurve.of(_as_stored(torch.randn(1, 20, 30)), "joint")

    shares = allocate_over_model([equal, alone], [450, 150])

    assert shares == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_keeping_nothing_or_everything_is_the_same_for_all(keep):
    groups = _groups()
    budgets = [keep * group.experts_EID.numel() for group in groups]

    shares = allocate_over_model([PriceCurve.of(g, "none") for g in groups], budgets)

    assert shares == pytest.approx([keep] * 4, abs=1e-9)


CODECS = [PrunedResidual, LowRankResidual, DenseResidual]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("center", ["joint", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allocate", ["expert", "group"])
def test_stored_bytes_are_at_most_and_nearly_what_is_told(codec, center, dtype, allocate):
    for count, rows, columns in ((1, 40, 60), (3, 31, 53), (8, 24, 75)):
        aligned = _as_stored(torch.randn(count, rows, columns))
        has_center = codec.uses_center and center != "none"
        size = StoredSize(count, rows, columns, dtype.itemsize, codec, has_center, fixed=128)
        for keep in (0.0, 0.1, 0.2575, 0.4):
            found = _encode(aligned, center, keep, codec=codec, allocate=allocate, dtype=dtype)
            if count == 1 and has_center and codec is PrunedResidual:
                # An expert alone is its own centre: it has no residual, whatever the share.
                assert _nbytes(found) + 128 <= size.bytes_at(keep)
                continue
            actual = _nbytes(found) + 128
            rounding = count * dtype.itemsize
            assert actual <= size.bytes_at(keep) <= 1.001 * actual + rounding, (count, keep)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    codec=st.sampled_from(CODECS),
    has_center=st.booleans(),
    share=st.floats(0, 1.2),
)
@settings(deadline=None)
def test_the_largest_keep_within_a_target_is_found(counts, rows, columns, codec, has_center, share):
    sizes = [StoredSize(count, rows, columns, 2, codec, has_center) for count in counts]

    def total_bytes(keep: float) -> int:
        return sum(size.bytes_at(keep) for size in sizes)

    target = total_bytes(0.0) + share * (total_bytes(1.0) - total_bytes(0.0))

    found = keep_for(target, total_bytes)

    fitting = [n / 1000 for n in range(1001) if total_bytes(n / 1000) <= target]
    assert found >= max(fitting)
    assert total_bytes(found) <= target
    assert found == 1 or total_bytes(min(1.0, found + 1e-9)) > target


def test_a_target_below_what_nothing_kept_takes_cannot_be_met():
    size = StoredSize(4, 20, 30, 2, PrunedResidual, True, fixed=100)

    assert keep_for(size.bytes_at(0.0) - 1, size.bytes_at) is None
    assert keep_for(size.bytes_at(0.0), size.bytes_at) is not None


def test_a_target_that_holds_everything_keeps_everything():
    size = StoredSize(4, 20, 30, 2, PrunedResidual, True)

    assert keep_for(size.bytes_at(1.0), size.bytes_at) == 1
