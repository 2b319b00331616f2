"""Every form of dispatch on real gloo ranks, against sums written out token by token.

One world per grid runs all forms and cases; the tests then look at what its ranks saw.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.dispatch import FORMS, check_form, dispatcher_for
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology
from resmoe_dist.routing import NO_EXPERT, RoutedTokens
from tests.parallel.collective_calls import Call, recorded_collectives
from tests.parallel.dispatch_cases import (
    CASES,
    EXPERTS,
    HIDDEN,
    TOP_K,
    copies_of,
    exact_sums,
    inputs,
    partial_sums,
)
from tests.ranks import run_on_ranks


class Grid(NamedTuple):
    """A world, and how it is divided. lanes: None is ep·dp."""

    world: int
    ep: int
    tp: int
    lanes: int | None = None


class Seen(NamedTuple):
    """What one rank saw of one case in one form."""

    routed: RoutedTokens
    calls: list[Call]
    out_TH: Tensor


def _forms(topology: Topology) -> list[str]:
    """The forms that a grid can use."""
    return [form for form in FORMS if form != "shared_batch" or topology.replica_lanes == 1]


def _run_cases(topology: Topology) -> dict[tuple[str, str], Seen]:
    seen = {}
    for form in _forms(topology):
        dispatcher = dispatcher_for(EXPERTS, topology, form)
        for name in CASES:
            with recorded_collectives() as calls:
                routed, metadata = dispatcher.dispatch(*inputs(name, topology.lane))
                out_TH = dispatcher.combine(partial_sums(routed, topology), metadata)
            seen[form, name] = Seen(routed, calls, out_TH)
    return seen


def _run_on_rank(ep: int, tp: int, lanes: int | None) -> tuple[Topology, dict]:
    topology = build_topology(ep, tp, lanes)
    seen = _run_cases(topology)
    # Rank 0 holds the store through which slower ranks still connect.
    torch.distributed.barrier()
    return topology.without_groups(), seen


# Among them two with data parallelism, and lanes of one, some and all expert-parallel positions.
GRIDS = [
    Grid(1, 1, 1),
    Grid(2, 2, 1),
    Grid(2, 1, 2),
    Grid(4, 4, 1),
    Grid(4, 4, 1, lanes=2),
    Grid(4, 2, 2),
    Grid(4, 2, 2, lanes=1),
    Grid(4, 2, 1),
    Grid(4, 2, 1, lanes=2),
    Grid(8, 4, 2, lanes=2),
    # Lanes of two replicas.
    Grid(4, 2, 1, lanes=1),
    Grid(4, 1, 2, lanes=1),
    Grid(2, 1, 1, lanes=1),
]


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def ranks(request: pytest.FixtureRequest) -> list[tuple[Topology, dict[tuple[str, str], Seen]]]:
    """The place of each rank of a grid, and what it saw."""
    world, *shape = request.param
    if world == 1:
        return [(SINGLE_PROCESS, _run_cases(SINGLE_PROCESS))]
    return run_on_ranks(world, _run_on_rank, *shape)


def _each(ranks: list) -> list[tuple[Topology, str, str, Seen]]:
    return [(place, *key, seen) for place, by_key in ranks for key, seen in by_key.items()]


@pytest.mark.slow
def test_outputs_are_the_weighted_sums_over_experts_and_tensor_parallel_ranks(ranks):
    for place, form, name, seen in _each(ranks):
        sums = exact_sums(name, place.lane)
        dtype = CASES[name].dtype
        # One rounding where a rank's sum is made, one of the total: half a unit each, of at most
        # the sum of the terms' magnitudes.
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert seen.out_TH.dtype == dtype
        assert seen.out_TH.shape == sums.exact.shape
        error = abs(seen.out_TH.double().numpy() - sums.exact)
        assert (error <= (rounding + 1e-6) * sums.magnitude).all(), (form, name)


@pytest.mark.slow
def test_all_ranks_of_a_lane_get_the_same_bits(ranks):
    first: dict = {}
    for place, form, name, seen in _each(ranks):
        expected = first.setdefault((form, name, place.lane), seen.out_TH)
        assert torch.equal(seen.out_TH, expected)


@pytest.mark.slow
def test_a_rank_receives_the_copies_of_its_experts_and_no_others(ranks):
    received: dict = defaultdict(list)
    for place, form, name, seen in _each(ranks):
        x_RH = seen.routed.x_RH.tolist()
        found = [(expert, *x_RH[row], weight) for expert, row, weight in copies_of(seen.routed)]
        assert len(seen.routed.token_N) == len(found)
        # The replicas of a lane share its copies.
        linked = place.dp_rank // place.lane_replicas
        received[linked, place.ep_rank, place.tp_rank, form, name] += found
    for place, form, name, _ in _each(ranks):
        owned, linked = place.owned_experts(EXPERTS), place.dp_rank // place.lane_replicas
        expected = [
            (owned.index(expert), *x_H, weight)
            for lane in range(linked * place.replica_lanes, (linked + 1) * place.replica_lanes)
            for x_H, experts, weights in zip(*_as_lists(name, lane), strict=True)
            for expert, weight in zip(experts, weights, strict=True)
            if expert in owned
        ]
        found = received[linked, place.ep_rank, place.tp_rank, form, name]
        assert sorted(found) == sorted(expected), (form, name)


@pytest.mark.slow
def test_each_replica_of_a_shared_batch_runs_every_other_of_its_experts(ranks):
    for place, form, _, seen in _each(ranks):
        if form == "shared_batch" and place.lane_replicas == 2:
            first = place.owned_experts(EXPERTS).start
            found = {first + expert for expert, _, _ in copies_of(seen.routed)}
            assert {expert % 2 for expert in found} <= {place.dp_rank}


def _as_lists(name: str, lane: int) -> list[list]:
    return [tensor.tolist() for tensor in inputs(name, lane)]


@pytest.mark.slow
def test_number_of_collectives(ranks):
    for place, form, name, seen in _each(ranks):
        agreement = int(place.replica_lanes > 1)
        shared = 1 if seen.out_TH.nbytes <= 1 << 18 else 2
        alone = place.linked_size == 1
        exchanged = 3 + int(place.lane_size > 1)
        expected = {
            # A replica of one rank has no other to exchange with.
            "exchange": shared if place.replica_size == 1 else exchanged,
            "decode": 2 + agreement if place.replica_lanes > 1 else shared,
            "shared_batch": shared,
        }
        if form in expected:
            assert len(seen.calls) == (0 if alone else expected[form]), (form, name)
        else:
            largest = max(CASES[name].tokens[: place.lanes])
            assert alone or largest > 32 or len(seen.calls) == expected["decode"]


def _message_bytes(dtype: torch.dtype) -> int:
    """A token in whole words of four bytes; a number and a weight for each of its copies."""
    return 4 * math.ceil(HIDDEN * dtype.itemsize / 4) + 8 * TOP_K


@pytest.mark.slow
def test_exchange_sends_a_token_once_to_each_rank_that_has_some_of_its_experts(ranks):
    for place, form, name, seen in _each(ranks):
        if form != "exchange" or place.replica_size == 1:
            continue
        index_TK = inputs(name, place.lane).index_TK.tolist()
        first, stop = (len(index_TK) * (place.lane_rank + i) // place.lane_size for i in (0, 1))
        each = EXPERTS // place.ep
        sent = [0] * place.replica_size
        for experts in index_TK[first:stop]:
            for position in {expert // each for expert in experts if expert != NO_EXPERT}:
                for tp_rank in range(place.tp):
                    sent[position * place.tp + tp_rank] += 1
        _, rows, sums, *_ = seen.calls
        assert rows.send_sizes == sent
        dtype = CASES[name].dtype
        assert rows.given_bytes == sum(sent) * _message_bytes(dtype)
        assert sums.given_bytes == len(seen.routed.x_RH) * HIDDEN * dtype.itemsize


@pytest.mark.slow
def test_bytes_of_decode_follow_from_the_largest_lane(ranks):
    for place, form, name, seen in _each(ranks):
        if form != "decode" or place.replica_lanes == 1:
            continue
        mine = place.dp_rank * place.replica_lanes
        capacity = max(CASES[name].tokens[mine : mine + place.replica_lanes])
        dtype, others = CASES[name].dtype, place.replica_lanes - 1
        _, out, back = seen.calls
        assert out.wire_bytes == others * capacity * _message_bytes(dtype)
        sums_bytes = HIDDEN * dtype.itemsize
        assert back.wire_bytes == (place.replica_size - 1) * capacity * sums_bytes


@pytest.mark.slow
def test_a_lanes_result_does_not_depend_on_the_tokens_of_other_lanes(ranks):
    for place, by_key in ranks:
        if place.lane == 0:
            for form in _forms(place):
                one = by_key[form, "uneven"]
                other = by_key[form, "uneven, other tokens beside lane 0"]
                assert torch.equal(one.out_TH, other.out_TH)


def _one_large_sum(form: str, lanes: int) -> Tensor:
    """A token with an expert on three ranks of four, whose sums are 256, 1 and 1."""
    topology = build_topology(4, 1, lanes)
    dispatcher = dispatcher_for(4, topology, form)
    routed, metadata = dispatcher.dispatch(
        torch.ones(1, 1).bfloat16(), torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
    )
    y_RH = torch.zeros(len(routed.x_RH), 1, dtype=torch.bfloat16)
    for _, row, _ in copies_of(routed):
        y_RH[row] = 1.0 if topology.ep_rank else 256.0
    return dispatcher.combine(y_RH, metadata)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "lanes"), [("exchange", 4), ("decode", 4), ("shared_batch", 1), ("exchange", 2)]
)
def test_sums_over_ranks_are_taken_in_float32_and_rounded_once(form, lanes):
    # In bfloat16, 256 + 1 is 256: added one by one, the ones would be lost.
    for combined in run_on_ranks(4, _one_large_sum, form, lanes):
        assert combined.item() == 258


def test_a_grid_of_one_rank_moves_nothing(monkeypatch):
    call = inputs("uneven", 0)
    dispatcher = dispatcher_for(EXPERTS, SINGLE_PROCESS)
    routed, metadata = dispatcher.dispatch(*call)

    assert routed.x_RH is call.x_TH
    y_TH = torch.ones(len(call.x_TH), HIDDEN)
    assert dispatcher.combine(y_TH, metadata) is y_TH


@pytest.mark.parametrize(
    ("form", "place", "reason"),
    [
        ("ring", SINGLE_PROCESS, "--dispatch ring: choose one of auto, exchange, decode"),
        ("shared_batch", Topology(ep=4, dp=2), "--dispatch shared_batch: .*give --lanes 2"),
    ],
)
def test_forms_that_cannot_be_used_are_refused(form, place, reason):
    with pytest.raises(UserError, match=reason):
        check_form(form, place)


def test_exact_sums_know_dropped_copies():
    # The reference itself: a token without experts has a sum of zero.
    sums = exact_sums("nothing goes anywhere", 0)
    assert not np.any(sums.exact)
