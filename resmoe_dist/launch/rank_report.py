"""What each rank of a grid holds and generated, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from resmoe_dist.evaluation.tables import human_bytes, text_table
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.generation import LaneOutput
from resmoe_dist.runtime.loading_cost import LoadingCost
from resmoe_dist.runtime.rank_memory import RankMemory


@dataclass(frozen=True)
class RankReport:
    """One rank: its place in the grid, what its lane generated, and the bytes it holds.

    loading: what it cost to load the model once. choosing: what came on top to compare numbers of
    lanes; None if the number was given.
    """

    place: Topology
    output: LaneOutput
    memory: RankMemory
    loading: LoadingCost
    choosing: LoadingCost | None = None


def gather_reports(
    topology: Topology,
    output: LaneOutput,
    memory: RankMemory,
    loading: LoadingCost,
    choosing: LoadingCost | None = None,
) -> list[RankReport]:
    """Every rank's report, in rank order. Collective over the world."""
    # Process groups cannot be sent.
    report = RankReport(topology.without_groups(), output, memory, loading, choosing)
    if not torch.distributed.is_initialized():
        return [report]
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports


def rank_table(reports: list[RankReport]) -> str:
    """Per rank its place, bytes and lane's speed; below, the whole grid."""
    header = ["rank", "lane", "tp", "experts", "groups", "centre", "residuals", "other", "tokens/s"]
    rows = []
    for rank, report in enumerate(reports):
        place, output, memory = report.place, report.output, report.memory
        experts = place.owned_experts(memory.num_experts)
        rows.append(
            [
                str(rank),
                str(place.lane),
                str(place.tp_rank),
                f"{experts.start}-{experts.stop - 1}",
                str(memory.groups),
                human_bytes(memory.center_bytes),
                human_bytes(memory.residual_bytes),
                human_bytes(memory.other_bytes),
                f"{output.new_tokens / output.seconds:.1f}" if output.new_tokens else "-",
            ]
        )
    tokens = sum(report.output.new_tokens for report in reports if report.place.lane_rank == 0)
    seconds = max(report.output.seconds for report in reports)
    place = reports[0].place
    held = sum(report.memory.expert_bytes for report in reports if report.place.dp_rank == 0)
    dense = reports[0].memory.dense_expert_bytes
    return (
        f"{text_table(header, rows, left=0)}\n"
        f"experts on all ranks together {human_bytes(held)}, dense {human_bytes(dense)}: "
        f"{held / dense if dense else 0:.1%}\n"
        f"{_loading_line(reports)}"
        f"ep {place.ep} x tp {place.tp} x dp {place.dp}: {tokens} tokens in {seconds:.2f} s, "
        f"{tokens / seconds:.1f} tokens/s in all"
    )


def _loading_line(reports: list[RankReport]) -> str:
    """Of the rank whose memory grew most; empty if that is not known."""
    peak, rank = max((r.loading.peak_bytes or 0, rank) for rank, r in enumerate(reports))
    if not peak:
        return ""
    loading = reports[rank].loading
    read = loading.read_bytes
    choosing = [r.choosing.peak_bytes or 0 for r in reports if r.choosing]
    return (
        f"loading: memory grew by {human_bytes(peak)} at most (rank {rank}, for "
        f"{human_bytes(loading.kept_bytes)} that stay"
        f"{'' if read is None else f', read {human_bytes(read)}'})"
        f"{f'; choosing the lanes: by {human_bytes(max(choosing))} more' if choosing else ''}\n"
    )


def as_json(
    prompts: list[str], completions: dict[int, str], reports: list[RankReport]
) -> dict[str, Any]:
    """Completions and figures for --json."""
    ranks = [
        {
            "rank": rank,
            "lane": report.place.lane,
            "ep_rank": report.place.ep_rank,
            "tp_rank": report.place.tp_rank,
            "experts": list(report.place.owned_experts(report.memory.num_experts)),
            "groups": report.memory.groups,
            "center_bytes": report.memory.center_bytes,
            "residual_bytes": report.memory.residual_bytes,
            "other_bytes": report.memory.other_bytes,
            "loading_peak_bytes": report.loading.peak_bytes,
            "loading_read_bytes": report.loading.read_bytes,
            "loading_kept_bytes": report.loading.kept_bytes,
            "choosing_peak_bytes": report.choosing and report.choosing.peak_bytes,
            "new_tokens": report.output.new_tokens,
            "seconds": report.output.seconds,
        }
        for rank, report in enumerate(reports)
    ]
    texts = [{"prompt": p, "completion": completions[i]} for i, p in enumerate(prompts)]
    dense = reports[0].memory.dense_expert_bytes
    return {"completions": texts, "ranks": ranks, "dense_expert_bytes": dense}
