"""Choosing a number of lanes by measurement, on real gloo ranks."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.parallel.lanes import LayerSizes, Workload, fastest_topology
from resmoe_dist.parallel.topology import Topology, build_topology, lane_choices
from tests.ranks import run_on_ranks

SIZES = LayerSizes(hidden=16, num_experts=4, top_k=2, dtype=torch.float32)


def _choose(ep: int, tp: int, sequences: int) -> Topology:
    place = build_topology(ep, tp, sequences=sequences)
    load = Workload(sequences=sequences, prompt_tokens=7, new_tokens=5, max_batch=2)
    chosen = fastest_topology(place, SIZES, load, torch.device("cpu"))
    torch.distributed.barrier()
    return chosen.without_groups()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "ep", "tp", "sequences", "possible"),
    [(4, 4, 1, 1, {1}), (4, 4, 1, 3, {1, 2}), (4, 2, 2, 9, {1, 2}), (4, 2, 1, 1, {2})],
)
def test_all_ranks_choose_the_same_lanes_and_each_lane_has_a_sequence(
    world, ep, tp, sequences, possible
):
    chosen = run_on_ranks(world, _choose, ep, tp, sequences)

    assert len({place.lanes for place in chosen}) == 1
    assert chosen[0].lanes in possible
    assert [place.lane for place in chosen] == sorted(place.lane for place in chosen)


def test_a_replica_is_divided_into_equal_lanes():
    assert lane_choices(ep=6, dp=1) == [1, 2, 3, 6]
    assert lane_choices(ep=4, dp=2) == [2, 4, 8]
