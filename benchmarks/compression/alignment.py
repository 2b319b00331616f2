"""Leave-one-out alignment beside the papers': seconds and objective on the same experts.

POT's transport onto its barycentre follows the barycentre itself, whose seconds, inside the same
run, are also listed separately. The seconds of both methods include the objective, which one
function computes for both.

Legend: E experts, I rows, D columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import logger, positive
from benchmarks.tables import Row
from benchmarks.timing import Clock, summary
from resmoe_dist.compression.alignment import align
from resmoe_dist.compression.assignment import SOLVERS, check_solver
from resmoe_dist.compression.stages import record_stages

KINDS = ("related", "unrelated")
NOISE = 0.5
TABLES = (
    (
        *("rows", "experts=kind", "rows", "{} s=seconds.*:s", "time loo/pot=time_ratio:.3f"),
        *("loo/barycenter=time_ratio_to_barycenter:.3f", "objective {}=objectives.*:.6g"),
        "objective loo/pot=objective_ratio:.5f",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `alignment`."""
    add = parser.add_argument
    add("--rows", type=positive, nargs="+", default=[1024, 2048, 4096])
    add("--columns", type=positive, default=3072)
    add("--experts", type=positive, default=8)
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--solver", choices=sorted(SOLVERS), default="scipy", help="of leave-one-out descent")


def random_experts(kind: str, count: int, rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal experts [E, I, D] in float32.

    related: one base for all, each with half as much noise and its rows in a random order.
    unrelated: independent.
    """
    generator = torch.Generator().manual_seed(seed)
    experts_EID = torch.empty(count, rows, columns).normal_(generator=generator)
    if kind == "unrelated":
        return experts_EID
    base_ID = torch.empty(rows, columns).normal_(generator=generator)
    for expert_ID in experts_EID:
        expert_ID.mul_(NOISE).add_(base_ID)
        expert_ID.copy_(expert_ID[torch.randperm(rows, generator=generator)])
    return experts_EID


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per kind of experts and number of rows."""
    check_solver(args.solver)
    return {
        "rows": [_compare(args, clock, kind, rows) for kind in args.kinds for rows in args.rows]
    }


def _compare(args: argparse.Namespace, clock: Clock, kind: str, rows: int) -> Row:
    experts_EID = random_experts(kind, args.experts, rows, args.columns, args.seed)
    objectives: dict[str, float] = {}
    barycenter: list[float] = []

    def run(method: str) -> None:
        with record_stages() as seconds:
            found = align(experts_EID, method, solver=args.solver, device=clock.device)
        objectives[method] = found.objective
        if method == "pot":
            barycenter.append(seconds["barycenter"])

    work: dict[str, Callable[[], None]] = {name: partial(run, name) for name in ("loo", "pot")}
    seconds = clock.compare(lambda: work) | {"barycenter": summary(barycenter)}
    logger.info("%s, %d rows: done", kind, rows)
    loo = seconds["loo"]["median"]
    return {
        "kind": kind,
        "experts": args.experts,
        "rows": rows,
        "columns": args.columns,
        "seconds": seconds,
        "time_ratio": loo / seconds["pot"]["median"],
        "time_ratio_to_barycenter": loo / seconds["barycenter"]["median"],
        "objectives": objectives,
        "objective_ratio": objectives["loo"] / objectives["pot"],
    }
