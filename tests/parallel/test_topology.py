"""The grid of ranks: its arithmetic by enumeration, its groups on real gloo ranks."""

from __future__ import annotations

from itertools import product

import pytest
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.topology import (
    SINGLE_PROCESS,
    Topology,
    build_topology,
    grid_position,
    lane_choices,
    lane_positions,
    owned_experts,
)
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_ranks_count_through_the_grid_with_tensor_parallelism_innermost(dp, ep, tp):
    enumerated = list(product(range(dp), range(ep), range(tp)))

    assert [grid_position(rank, ep, tp) for rank in range(dp * ep * tp)] == enumerated


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_lanes_are_numbered_without_gaps_and_shared_by_tensor_parallel_ranks(dp, ep):
    lanes = []
    for rank in range(dp * ep * 2):
        dp_rank, ep_rank, tp_rank = grid_position(rank, ep, 2)
        place = Topology(ep=ep, tp=2, dp=dp, ep_rank=ep_rank, tp_rank=tp_rank, dp_rank=dp_rank)
        assert place.lanes == dp * ep
        lanes.append(place.lane)

    assert lanes == [lane for lane in range(dp * ep) for _ in range(2)]


@pytest.mark.parametrize(
    ("lanes", "sequences", "expected"),
    # On a grid of ep 4 and dp 2: 1, 2, 4 or 8 lanes.
    [
        *[(None, None, 1), (2, None, 4), (4, 1, 2), (1, 8, 8)],
        *[(None, 1, 8), (None, 3, 4), (None, 5, 2), (None, 8, 1)],
    ],
)
def test_lanes_are_as_asked_or_as_many_as_get_a_sequence(lanes, sequences, expected):
    assert lane_positions(lanes, ep=4, dp=2, sequences=sequences) == expected


def test_lanes_that_do_not_divide_the_grid_are_refused_with_the_choices():
    with pytest.raises(UserError, match=r"--lanes 3: .* has 1 or 2 or 4 or 8"):
        lane_positions(3, ep=4, dp=2)


# Half a replica, one, and two of four.
@pytest.mark.parametrize(("dp", "lane_ep"), [(1, 2), (2, 2), (2, 4), (4, 8)])
def test_ranks_of_a_lane_are_neighbours(dp, lane_ep):
    places = [
        Topology(4, 2, dp, lane_ep, ep_rank=ep_rank, tp_rank=tp_rank, dp_rank=dp_rank)
        for dp_rank, ep_rank, tp_rank in product(range(dp), range(4), range(2))
    ]
    assert [(place.lane, place.lane_rank) for place in places] == [
        (lane, rank) for lane in range(4 * dp // lane_ep) for rank in range(2 * lane_ep)
    ]
    assert {place.lanes for place in places} == {4 * dp // lane_ep}


@given(ep=st.integers(1, 16), each=st.integers(1, 16))
def test_experts_are_dealt_out_in_order_in_equal_shares(ep, each):
    owned = [owned_experts(ep * each, ep_rank, ep) for ep_rank in range(ep)]

    assert [expert for experts in owned for expert in experts] == list(range(ep * each))
    assert {len(experts) for experts in owned} == {each}


def test_a_place_in_the_grid_owns_the_experts_of_its_expert_parallel_rank():
    place = Topology(ep=4, tp=2, dp=2, ep_rank=2, tp_rank=1, dp_rank=1)

    assert list(place.owned_experts(8)) == [4, 5]


def test_a_single_process_owns_every_expert():
    assert list(SINGLE_PROCESS.owned_experts(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("experts", "ep"), [(6, 4), (5, 2), (2, 4), (60, 8)])
def test_experts_that_do_not_divide_are_refused_with_the_choices_there_are(experts, ep):
    choices = ", ".join(str(size) for size in range(1, experts + 1) if experts % size == 0)

    with pytest.raises(UserError, match=f"--ep {ep}: {experts} experts .* one of {choices}$"):
        owned_experts(experts, 0, ep)


def _build(ep: int, tp: int) -> tuple[Topology, list[int], list[int]]:
    """This rank's place, without its groups (they cannot travel), and the groups' ranks."""
    found = build_topology(ep, tp)
    alone = [torch.distributed.get_rank()]
    ranks = [
        alone if group is None else torch.distributed.get_process_group_ranks(group)
        for group in (found.ep_group, found.tp_group)
    ]
    place = {name: getattr(found, name) for name in ("ep", "tp", "dp")}
    place |= {f"{name}_rank": getattr(found, f"{name}_rank") for name in ("ep", "tp", "dp")}
    # Rank 0 is in few groups and done early, and its store must live until the others are.
    torch.distributed.barrier()
    return Topology(**place), *ranks


def _build_all(grids: list[tuple[int, int]]) -> list:
    """Build grids one after the other: what `_build` gives, or a UserError's message."""
    found = []
    for ep, tp in grids:
        try:
            found.append(_build(ep, tp))
        except UserError as error:
            found.append(str(error))
    return found


def _check_grid(results: list, ep: int, tp: int) -> None:
    """Every rank is where rank = (dp · ep + ep_rank) · tp + tp_rank puts it, among its peers."""
    world, dp = len(results), len(results) // (ep * tp)
    rank_at = {
        place: (place[0] * ep + place[1]) * tp + place[2]
        for place in product(range(dp), range(ep), range(tp))
    }
    assert sorted(rank_at.values()) == list(range(world))
    for (dp_rank, ep_rank, tp_rank), rank in rank_at.items():
        topology, ep_ranks, tp_ranks = results[rank]
        assert topology == Topology(
            ep=ep, tp=tp, dp=dp, ep_rank=ep_rank, tp_rank=tp_rank, dp_rank=dp_rank
        )
        assert ep_ranks == [rank_at[dp_rank, i, tp_rank] for i in range(ep)]
        assert tp_ranks == [rank_at[dp_rank, ep_rank, i] for i in range(tp)]


# World, then the grid: the first with data parallelism, which no single model needs.
@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep", "tp"), [(4, 2, 1), (4, 1, 2), (2, 2, 1), (2, 1, 2)])
def test_groups_hold_the_ranks_that_the_formula_names(world, ep, tp):
    results = run_on_ranks(world, _build, ep, tp)

    _check_grid(results, ep, tp)


@pytest.mark.slow
def test_a_second_grid_in_one_process_is_refused_where_it_contradicts_the_first():
    second = [(2, 1), (4, 1), (1, 4), (1, 2), (1, 1), (3, 1)]
    contradicting = {(2, 1), (4, 1), (1, 4), (1, 1)}

    results = run_on_ranks(4, _build_all, [(2, 2), *second, (2, 2)])

    for found in results:
        answers = dict(zip(second, found[1:-1], strict=True))
        for grid in contradicting:
            assert "load one grid per process" in answers[grid], grid
        assert "4 ranks are not a multiple" in answers[3, 1]
    # The first grid is as it was, and one that shares its tensor-parallel groups is no other.
    _check_grid([found[0] for found in results], 2, 2)
    _check_grid([found[-1] for found in results], 2, 2)
    _check_grid([found[1 + second.index((1, 2))] for found in results], 1, 2)


@pytest.mark.slow
def test_grids_that_agree_on_tensor_parallelism_live_side_by_side():
    results = run_on_ranks(4, _build_all, [(4, 1), (2, 1), (1, 1)])

    for i, ep in enumerate((4, 2, 1)):
        _check_grid([found[i] for found in results], ep, 1)


def test_a_replica_is_divided_into_equal_lanes():
    assert lane_choices(ep=6, dp=1) == [1, 2, 3, 6]


def test_a_lane_is_a_part_of_a_replica_or_whole_replicas():
    assert lane_choices(ep=4, dp=2) == [1, 2, 4, 8]
    assert lane_choices(ep=1, dp=4) == [1, 2, 4]
    # Two lanes would have a replica and a half each.
    assert lane_choices(ep=2, dp=3) == [1, 3, 6]
