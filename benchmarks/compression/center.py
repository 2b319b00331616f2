"""What the joint centre saves over the barycentre at the same bytes, on Gaussian experts.

Values are independent standard normal numbers and rows are not aligned, which is what alignment
leaves of unrelated experts. The barycentre is measured twice: with one threshold per group, as the
joint centre has it, and with one per expert, as in the papers.

Legend: E experts, I rows, D columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import logger, positive, share
from benchmarks.tables import Row
from benchmarks.timing import Clock
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.encoding import Encoded, GroupCodecs, encode_group
from resmoe_dist.compression.permutations import identity_permutations

# Centre, and what shares one budget of kept entries.
METHODS = {
    "joint": ("joint", "group"),
    "barycenter": ("barycenter", "group"),
    "paper": ("barycenter", "expert"),
}
TABLES = (
    (
        *("rows", "experts", "keep:g", "error {}=relative_errors.*:.5f", "{} s=seconds.*:s"),
        *("joint to barycenter=change:+.1%", "joint to paper=change_to_paper:+.1%"),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `center`."""
    add = parser.add_argument
    add("--experts", type=positive, nargs="+", default=[2, 4, 8, 16], help="per group")
    add("--keeps", type=share, nargs="+", default=[0.125, 0.25, 0.5])
    add("--rows", type=positive, default=1024)
    add("--columns", type=positive, default=3072)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per number of experts and keep."""
    rows = []
    for count in args.experts:
        generator = torch.Generator().manual_seed(args.seed)
        experts_EID = torch.empty(count, args.rows, args.columns).normal_(generator=generator)
        rows += [_compare(clock, experts_EID, keep) for keep in args.keeps]
        logger.info("%d experts: done", count)
    return {"rows": rows}


def _compare(clock: Clock, experts_EID: Tensor, keep: float) -> Row:
    codecs = GroupCodecs(CodecSpec(name="pruned", options={"keep": keep}), torch.float32)
    encoded: dict[str, Encoded] = {}

    def run(name: str, center: str, allocate: str) -> None:
        # Made here, because it caches its sample: the next method would gain from it.
        order_EI = identity_permutations(experts_EID)
        aligned = AlignedExperts(experts_EID, order_EI, device=clock.device)
        encoded[name] = encode_group(aligned, codecs, center=center, allocate=allocate)

    work: dict[str, Callable[[], None]] = {n: partial(run, n, *how) for n, how in METHODS.items()}
    seconds = clock.compare(lambda: work)
    norm = float(torch.linalg.vector_norm(experts_EID, dtype=torch.float64)) ** 2
    errors = {name: found.squared_error for name, found in encoded.items()}
    return {
        "experts": len(experts_EID),
        "keep": keep,
        "relative_errors": {name: error / norm for name, error in errors.items()},
        "kept": {name: sum(loss.kept for loss in found.losses) for name, found in encoded.items()},
        "change": errors["joint"] / errors["barycenter"] - 1,
        "change_to_paper": errors["joint"] / errors["paper"] - 1,
        "seconds": seconds,
    }
