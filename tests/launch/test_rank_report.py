"""The table that `infer` prints: what it says of memory."""

from __future__ import annotations

from resmoe_dist.launch.rank_report import RankReport, as_json, rank_table
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.generation import LaneOutput
from resmoe_dist.runtime.loading_cost import LoadingCost
from resmoe_dist.runtime.rank_memory import RankMemory

MIB = 1 << 20


def _report(ep_rank: int, peak: int, *, tried: int | None) -> RankReport:
    """A rank that keeps 2 MiB of experts and 1 MiB of everything else."""
    return RankReport(
        Topology(ep=2, ep_rank=ep_rank),
        LaneOutput({ep_rank: "text"}, new_tokens=6, seconds=2.0),
        RankMemory(MIB, MIB, MIB, groups=1, num_experts=4, dense_expert_bytes=8 * MIB),
        LoadingCost(peak * MIB, read_bytes=5 * MIB, kept_bytes=3 * MIB),
        None if tried is None else LoadingCost(tried * MIB, read_bytes=0),
    )


def test_loading_and_choosing_the_lanes_are_told_apart():
    reports = [_report(0, 4, tried=9), _report(1, 7, tried=8)]

    lines = rank_table(reports).splitlines()

    assert "experts on all ranks together 4.0 MiB, dense 8.0 MiB: 50.0%" in lines
    assert (
        "loading: memory grew by 7.0 MiB at most (rank 1, for 3.0 MiB that stay, read 5.0 MiB); "
        "choosing the lanes: by 9.0 MiB more" in lines
    )
    assert lines[-1] == "ep 2 x tp 1 x dp 1: 12 tokens in 2.00 s, 6.0 tokens/s in all"
    ranks = as_json(["a", "b"], {0: "text", 1: "text"}, reports)["ranks"]
    assert [rank["choosing_peak_bytes"] for rank in ranks] == [9 * MIB, 8 * MIB]


def test_lanes_that_were_given_cost_nothing_to_choose():
    reports = [_report(0, 4, tried=None)]

    assert rank_table(reports).splitlines()[-2].endswith("that stay, read 5.0 MiB)")
    assert as_json(["a"], {0: "text"}, reports)["ranks"][0]["choosing_peak_bytes"] is None
