"""Leave-one-out alignment beside the papers': seconds and objective on the same experts.

POT's transport onto its barycentre comes after the barycentre itself; the latter's seconds, taken
inside the same run, are listed on their own. Those of both methods include the objective, which one
function computes for both.

Legend: N experts, I rows, D columns.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any
from unittest.mock import patch

import ot
import torch
from torch import Tensor

from benchmarks.machine import shown, summary, timed
from resmoe_dist.compression.alignment import align
from resmoe_dist.compression.assignment import SOLVERS, check_solver
from resmoe_dist.evaluation.tables import text_table

KINDS = ("related", "unrelated")
NOISE = 0.5

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `alignment`."""
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1024, 2048, 4096])
    add("--columns", type=int, default=3072)
    add("--experts", type=int, default=8)
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--repeats", type=int, default=3)
    add("--solver", choices=sorted(SOLVERS), default="scipy", help="of the leave-one-out descent")
    add("--seed", type=int, default=0)


def random_experts(kind: str, count: int, rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal experts [N, I, D], float32, the rows of each in an order of its own.

    related: one base for all, and half as much noise in each; unrelated: each its own.
    """
    generator = torch.Generator().manual_seed(seed)
    experts_NID = torch.empty(count, rows, columns).normal_(generator=generator)
    if kind == "unrelated":
        return experts_NID
    base_ID = torch.empty(rows, columns).normal_(generator=generator)
    for expert_ID in experts_NID:
        expert_ID.mul_(NOISE).add_(base_ID)
        expert_ID.copy_(expert_ID[torch.randperm(rows, generator=generator)])
    return experts_NID


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row per kind and number of rows."""
    check_solver(args.solver)
    sizes = [(kind, rows) for kind in args.kinds for rows in args.rows]
    return {"rows": [_compare(args, kind, rows) for kind, rows in sizes]}


def _compare(args: argparse.Namespace, kind: str, rows: int) -> dict[str, Any]:
    experts_NID = random_experts(kind, args.experts, rows, args.columns, args.seed)
    seconds: dict[str, list[float]] = {"loo": [], "pot": [], "barycenter": []}
    objectives = {}
    for repeat in range(args.repeats):
        # In turns, and each first in turn: neither has the quieter machine.
        for method in ("loo", "pot")[:: 1 if repeat % 2 == 0 else -1]:
            objectives[method], taken, inside = _align(experts_NID, method, args.solver)
            seconds[method].append(taken)
            seconds["barycenter"] += inside
            logger.info(
                "%s, %d rows: %s took %.2f s (%d of %d)",
                *(kind, rows, method, taken, repeat + 1, args.repeats),
            )
    assert len(seconds["barycenter"]) == args.repeats
    times = {name: summary(taken) for name, taken in seconds.items()}
    return {
        "kind": kind,
        "experts": args.experts,
        "rows": rows,
        "columns": args.columns,
        "seconds": times,
        "time_ratio": times["loo"]["median"] / times["pot"]["median"],
        "time_ratio_to_barycenter": times["loo"]["median"] / times["barycenter"]["median"],
        "objectives": objectives,
        "objective_ratio": objectives["loo"] / objectives["pot"],
    }


def _align(experts_NID: Tensor, method: str, solver: str) -> tuple[float, float, list[float]]:
    """Objective, seconds, and the seconds of each of POT's barycentres within."""
    inside: list[float] = []
    barycenter = ot.lp.free_support_barycenter

    def timed_barycenter(*args: Any, **kwargs: Any) -> Any:
        result, taken = timed(lambda: barycenter(*args, **kwargs))
        inside.append(taken)
        return result

    with patch.object(ot.lp, "free_support_barycenter", timed_barycenter):
        found, taken = timed(lambda: align(experts_NID, method, solver=solver))
    return found.objective, taken, inside


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    header = ["experts", "rows", "loo s", "POT s", "of it barycentre s", "time loo/POT"]
    header += ["loo/barycentre", "objective loo", "POT", "loo/POT"]
    rows = []
    for row in results["rows"]:
        seconds, objectives = row["seconds"], row["objectives"]
        rows.append(
            [
                *(row["kind"], str(row["rows"])),
                *(shown(seconds[name]) for name in ("loo", "pot", "barycenter")),
                f"{row['time_ratio']:.3f}",
                f"{row['time_ratio_to_barycenter']:.3f}",
                *(f"{objectives['loo']:.6g}", f"{objectives['pot']:.6g}"),
                f"{row['objective_ratio']:.5f}",
            ]
        )
    return text_table(header, rows)
