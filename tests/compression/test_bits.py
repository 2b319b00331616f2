"""Which matrices get how many bits: against every possible choice, for groups small enough."""

from __future__ import annotations

import itertools
import math

import pytest

from resmoe_dist.compression.bits import (
    CENTER_BITS,
    RESIDUAL_BITS,
    GroupBits,
    GroupEnergies,
    allocate_bits,
)

# Errors of an ideal code, and bytes of a matrix of 1000 entries.
ERRORS = tuple(4.0**-bits for bits in RESIDUAL_BITS)
SIZES = tuple(125 * bits for bits in RESIDUAL_BITS)


def _group(residual, whole, center, weight=(1.0, 1.0)) -> GroupEnergies:
    return GroupEnergies(residual, whole, center, weight, ERRORS, SIZES)


def _size(bits: GroupBits) -> int:
    return 125 * (sum(bits.residual_E) + (bits.center or 0))


def _error(group: GroupEnergies, bits: GroupBits) -> float:
    error = 0.0
    for k, each in enumerate(bits.residual_E):
        coded = group.whole_E[k]
        if bits.center is not None:
            coded = group.residual_E[k] + 4.0**-bits.center * group.center
        error += group.weight_E[k] * 4.0**-each * coded
    return error


def _best(group: GroupEnergies, target: float) -> float:
    """The least error of all choices that fit."""
    choices = itertools.product(CENTER_BITS, *[RESIDUAL_BITS] * len(group.whole_E))
    found = (GroupBits(center, residual) for center, *residual in choices)
    return min(_error(group, bits) for bits in found if _size(bits) <= target)


GROUPS = {
    "alike": _group((1.0, 1.0), (10.0, 10.0), 9.0),
    "unrelated": _group((9.0, 9.5), (10.0, 10.0), 0.7),
    "unequal": _group((1.0, 20.0), (30.0, 50.0), 29.0),
    "seldom used": _group((5.0, 5.0), (10.0, 10.0), 5.0, (1.0, 1e-3)),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("target", [250, 500, 625, 1000, 1500, 3000])
def test_bits_fit_and_hardly_any_choice_loses_less(name, target):
    group = GROUPS[name]
    [found] = allocate_bits([group], target)
    assert _size(found) <= target
    # Prices find the convex hull of the choices; the rest is spent greedily.
    assert _error(group, found) <= 1.8 * _best(group, target)


@pytest.mark.parametrize("name", GROUPS)
def test_choices_at_a_price_are_the_best_for_their_size(name):
    group = GROUPS[name]
    for target in range(250, 3000, 125):
        [found] = allocate_bits([group], target)
        if _size(found) == target:
            exact = _best(group, target)
            assert _error(group, found) <= 1.8 * exact
    [all_bits] = allocate_bits([group], 10_000)
    assert set(all_bits.residual_E) == {8}


def test_many_experts_meet_a_target_from_below_within_one_percent():
    group = _group((1.0,) * 128, (2.0,) * 128, 1.0, (1.0,) * 128)
    for bits in (1.3, 2.1, 2.9, 3.5):
        target = 128 * 125 * bits
        found = allocate_bits([group] * 2, 2 * target)
        total = sum(_size(each) for each in found)
        assert 0.99 * 2 * target <= total <= 2 * target


def test_a_centre_is_chosen_where_it_pays():
    related, unrelated = GROUPS["alike"], GROUPS["unrelated"]
    found = allocate_bits([related, unrelated], 2 * 750)
    assert found[0].center is not None and found[1].center is None


def test_a_group_that_may_not_have_a_centre_gets_none():
    [found] = allocate_bits([_group((1.0, 1.0), (10.0, 10.0), None)], 1000)
    assert found == GroupBits(None, (4, 4))


def test_the_more_an_expert_counts_the_more_bits_it_gets():
    [found] = allocate_bits([GROUPS["seldom used"]], 750)
    assert found.residual_E[0] > found.residual_E[1]
    assert math.isfinite(_error(GROUPS["seldom used"], found))


def test_weights_of_a_group_are_multiplied_together():
    group = GROUPS["seldom used"]

    found = group.weighted(3.0)

    assert found.whole == pytest.approx(3 * group.whole)
    assert found.whole_E == group.whole_E
    assert group.whole == sum(w * e for w, e in zip(group.weight_E, group.whole_E, strict=True))


def test_too_small_a_target_is_none():
    assert allocate_bits([GROUPS["alike"]], 249) is None
