"""What the joint centre saves over the barycentre at the same bytes, on Gaussian experts.

Standard normal values, independent and unaligned: what alignment leaves of unrelated experts. The
barycentre is measured twice: with one threshold per group as the joint centre has it, and with one
per expert, as the papers prune.

Legend: N experts, I rows, D columns.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

from benchmarks.machine import shown, summary, timed
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.evaluation.tables import text_table

# Name: centre, and what shares one budget.
METHODS = {
    "joint": ("joint", "group"),
    "barycenter": ("barycenter", "group"),
    "paper": ("barycenter", "expert"),
}

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `center`."""
    add = parser.add_argument
    add("--experts", type=int, nargs="+", default=[2, 4, 8, 16], help="per group")
    add("--keeps", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    add("--rows", type=int, default=1024)
    add("--columns", type=int, default=3072)
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row per number of experts and keep."""
    rows = []
    for count in args.experts:
        generator = torch.Generator().manual_seed(args.seed)
        experts_NID = torch.empty(count, args.rows, args.columns).normal_(generator=generator)
        as_stored_NI = torch.arange(args.rows).repeat(count, 1)
        for keep in args.keeps:
            aligned = AlignedExperts(experts_NID, as_stored_NI)
            rows.append(_compare(aligned, keep, args.repeats))
            logger.info("%d experts, keep %g: done", count, keep)
    return {"rows": rows}


def _compare(aligned: AlignedExperts, keep: float, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    errors: dict[str, float] = {}
    kept: dict[str, int] = {}
    codecs = GroupCodecs(CodecSpec(name="pruned", options={"keep": keep}), torch.float32)
    for _ in range(repeats):
        for name, (center, allocate) in METHODS.items():
            # Afresh: what it remembers of its sample would be the next method's gain.
            fresh = AlignedExperts(aligned.experts_EID, aligned.permutations_EI)
            encoded, taken = timed(
                lambda fresh=fresh, center=center, allocate=allocate: encode_group(
                    fresh, codecs, center=center, allocate=allocate
                )
            )
            seconds[name].append(taken)
            errors[name] = encoded.squared_error
            kept[name] = sum(loss.kept for loss in encoded.losses)
    norm = float(torch.linalg.vector_norm(aligned.experts_EID, dtype=torch.float64)) ** 2
    return {
        "experts": aligned.count,
        "keep": keep,
        "relative_errors": {name: error / norm for name, error in errors.items()},
        "kept": kept,
        "change": errors["joint"] / errors["barycenter"] - 1,
        "change_to_paper": errors["joint"] / errors["paper"] - 1,
        "seconds": {name: summary(taken) for name, taken in seconds.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    header = ["experts", "keep", "joint", "barycentre", "per expert", "joint to barycentre"]
    header += ["joint to per expert", "joint s", "barycentre s", "per expert s"]
    rows = [
        [
            *(str(row["experts"]), f"{row['keep']:g}"),
            *(f"{row['relative_errors'][name]:.5f}" for name in METHODS),
            *(f"{row['change']:+.1%}", f"{row['change_to_paper']:+.1%}"),
            *(shown(row["seconds"][name]) for name in METHODS),
        ]
        for row in results["rows"]
    ]
    return text_table(header, rows)
