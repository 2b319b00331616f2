"""One MoE layer on several ranks: ours beside DeepSpeed's MoE and transformers' expert parallelism.

    python -m benchmarks.moe_layer --ep 4 --tp 2
    deepspeed benchmarks/moe_layer.py --ep 4 --tp 2

All systems (see `moe_systems.py`) run in one launch, on the same ranks, with the same tokens, the
same routing and the same weights: those that the compressed layer restores to. They take turns; a
turn begins at a barrier with cold caches, and its time is that of the slowest rank. Before a case
is timed, all outputs are compared with float32 products; an error above 3 % of a token's norm ends
the run.

A step carries --tokens tokens over all ranks together. A system divides them over its batches: with
8 tokens and 8 ranks, DeepSpeed has one token per rank, a grid with 4 lanes two per lane, a shared
batch all 8 on every rank.

fastest       of each library; `ours` and `theirs` name the form that was
us/token      seconds of a step / its tokens, median
ratio         DeepSpeed's median / this one's: above 1 is faster than stock DeepSpeed
collectives   per step on one rank, counted in PyTorch's communication library
wire/token    bytes that leave ranks for others, all ranks together, per token (see `wire.py`)
error         the largest difference of a token's output from float32 products, relative to its norm
stages        medians of the mean over ranks; dispatch and combine include waiting for others
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    # As a script. Python would look for modules in this folder, whose names others have too.
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor

from benchmarks.codec_arguments import add_codec_arguments, codec_specs
from benchmarks.harness import logger, main, positive
from benchmarks.kernels import TOLERANCE
from benchmarks.moe_systems import (
    Router,
    System,
    autoep_systems,
    deepspeed_system,
    our_systems,
    transformers_systems,
)
from benchmarks.ranks import (
    RanksClock,
    add_grid_arguments,
    barrier,
    join_grid,
    largest,
    of_all_ranks,
    rank,
    world_size,
)
from benchmarks.stages import STAGES, stage_seconds
from benchmarks.tables import Row
from benchmarks.timing import Clock
from benchmarks.ways import DENSE
from benchmarks.wire import WireCount
from resmoe_dist.design_matrix import row_range
from resmoe_dist.errors import first_line
from resmoe_dist.evaluation.tables import human_bytes
from resmoe_dist.parallel.topology import Topology, build_topology
from resmoe_dist.testing.random_layer import RandomLayer, parse_shape

FORMS = ("decode", "exchange", "shared_batch")
_BASELINE = "deepspeed MoE"
_STAGE_STEPS = 5
# Hidden, rows, experts, experts per token: like Mixtral and like DeepSeek, narrower.
_SHAPES = ("1024x3584x8x2", "1024x704x64x6")

_CASE = ("layer=shape", "tokens")
TABLES = (
    ("fastest", *_CASE, "{} us/token=us.*:.0f", "ours=systems.resmoe", "theirs=theirs"),
    (
        *("rows", *_CASE, "system", "us/token=us_per_token:.0f", "step ms=seconds:ms"),
        *("ratio:.2f", "collectives", "wire/token=wire_bytes_per_token:bytes"),
        *("experts/rank=rank_bytes:bytes", "error=relative_error:.2%"),
    ),
    ("rows", *_CASE, "system", "{} ms=stages_ms.*:.2f"),
    ("skipped", *_CASE, "left out=system", "because=reason"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_grid_arguments(parser, ep=4, tp=2)
    add, shapes = parser.add_argument, [parse_shape(text) for text in _SHAPES]
    add("--shapes", nargs="+", type=parse_shape, default=shapes, metavar="HxIxExK")
    add("--tokens", nargs="+", type=positive, default=[8, 32, 128, 2048], metavar="N")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="our forms of dispatch")
    add("--experts", nargs="+", choices=DENSE, default=list(DENSE), help="of transformers")
    add_codec_arguments(parser)
    parser.set_defaults(repeats=15, seconds=60)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per shape, number of tokens and system. skipped: systems that cannot run."""
    place = join_grid(args)
    clock = RanksClock(clock)
    topologies = [place]
    if place.replica_lanes > 1:
        topologies.append(build_topology(args.ep, args.tp, lanes=place.dp))
    results: dict[str, Any] = {"fastest": [], "rows": [], "skipped": []}
    codec, center = codec_specs(args)
    for shape in args.shapes:
        layer = RandomLayer(shape, codec, clock.device, args.seed, center=center)
        weight_EH = torch.randn(shape.experts, shape.hidden, generator=layer.generator)
        router = Router(weight_EH / math.sqrt(shape.hidden), shape.top_k)
        systems = systems_of(args, layer, router, topologies)
        for tokens in args.tokens:
            rows, skipped = measure_case(clock, layer, router, systems, tokens)
            results["fastest"].append(fastest_of(rows))
            results["rows"] += rows
            results["skipped"] += skipped
            if rank() == 0:
                logger.info("%s, %d tokens: done", shape, tokens)
        del layer, systems
    return results


def systems_of(
    args: argparse.Namespace, layer: RandomLayer, router: Router, topologies: list[Topology]
) -> list[System]:
    """All systems, DeepSpeed first.

    Raises UserError if the experts do not divide over the ranks.
    """
    return [
        deepspeed_system(layer, router),
        *autoep_systems(layer, router),
        *our_systems(layer, router, topologies, args.forms),
        *transformers_systems(layer, router, tuple(args.experts)),
    ]


def measure_case(
    clock: RanksClock, layer: RandomLayer, router: Router, systems: list[System], tokens: int
) -> tuple[list[Row], list[Row]]:
    """A row for each system that runs with `tokens` tokens, and one for each that does not."""
    case = {"shape": layer.shape.name, "tokens": tokens}
    x_NH = layer.tokens(tokens)[0]
    # Each rank checks its share of the tokens, whatever share a system gives it.
    checked_TH = x_NH[slice(*row_range(tokens, rank(), world_size()))]
    exact_TH = layer.exact(checked_TH, *router(checked_TH))
    found, skipped = {}, []
    for system in systems:
        copied = tokens * system.copied_bytes
        if copied > clock.effort.gathered_bytes // world_size():
            reason = f"would copy {human_bytes(copied)} of weights on each rank"
            skipped.append(case | {"system": system.name, "reason": reason})
            continue
        try:
            found[system.name] = _check(layer, system, x_NH, exact_TH)
        except (RuntimeError, NotImplementedError) as error:
            if system.name.startswith(("resmoe", _BASELINE)):
                raise
            skipped.append(case | {"system": system.name, "reason": first_line(error)})
    running = [system for system in systems if system.name in found]

    def prepare() -> dict[str, Callable[[], Tensor]]:
        new_NH = layer.tokens(tokens)[0]
        return {system.name: partial(system.run, system.share(new_NH)) for system in running}

    droppable = [name for name in found if name.startswith(("transformers", "autoep"))]
    seconds = clock.compare(prepare, may_drop=droppable)
    stages = {system.name: _stages(system, x_NH) for system in running}
    baseline = seconds.get(_BASELINE, {}).get("median")
    rows = [
        {
            **case,
            "system": system.name,
            "batches": system.batches,
            "seconds": seconds[system.name],
            "us_per_token": 1e6 * seconds[system.name]["median"] / tokens,
            "ratio": baseline and baseline / seconds[system.name]["median"],
            **found[system.name],
            "rank_bytes": int(largest(system.bytes)),
            "stages_ms": stages[system.name],
        }
        for system in running
    ]
    return rows, skipped


def fastest_of(rows: list[Row]) -> Row:
    """The fastest system of each library in one case, by its name's first word."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: -row["us_per_token"]):
        best[row["system"].split()[0]] = row
    theirs = min((best[n] for n in best if "resmoe" not in n), key=lambda row: row["us_per_token"])
    return {
        "shape": rows[0]["shape"],
        "tokens": rows[0]["tokens"],
        "us": {name: row["us_per_token"] for name, row in sorted(best.items())},
        "systems": {name: row["system"] for name, row in sorted(best.items())},
        "theirs": theirs["system"],
    }


def _check(layer: RandomLayer, system: System, x_NH: Tensor, exact_TH: Tensor) -> Row:
    """Run a system once to check its output, and once more to count its collectives.

    exact_TH: of this rank's share of the tokens, by float32 products. Raises ValueError on every
    rank if one of them finds a difference above TOLERANCE.
    """
    tokens, mine_TH = len(x_NH), system.share(x_NH)
    out_TH = system.run(mine_TH)
    first = row_range(tokens, system.batch, system.batches)[0]
    start, stop = row_range(tokens, rank(), world_size())
    error = 0.0
    if stop > start:
        difference_TH = out_TH[start - first : stop - first].float() - exact_TH
        error = float((difference_TH.norm(dim=1) / exact_TH.norm(dim=1)).max())
    error = largest(error if math.isfinite(error) else math.inf)
    if error > TOLERANCE:
        raise ValueError(
            f"{layer.shape}, {tokens} tokens: the output of {system.name} differs by {error:.1%} "
            "from float32 products of the same weights"
        )
    barrier()
    with WireCount() as count:
        system.run(mine_TH)
    sent = sum(of_all_ranks(count.bytes))
    return {
        "relative_error": error,
        "collectives": count.collectives,
        "calls": dict(count.calls),
        "wire_bytes": sent,
        "wire_bytes_per_token": sent / tokens,
    }


def _stages(system: System, x_NH: Tensor) -> dict[str, float]:
    """Milliseconds of each stage: the mean over ranks, the median over a few steps."""
    mine, found = system.share(x_NH), []
    for _ in range(_STAGE_STEPS):
        barrier()
        found += stage_seconds(partial(system.run, mine), [system.parts])
    ranks = of_all_ranks(found)
    means = [
        {stage: statistics.fmean(one[stage] for one in step) for stage in STAGES}
        for step in zip(*ranks, strict=True)
    ]
    return {stage: 1000 * statistics.median(mean[stage] for mean in means) for stage in STAGES}


if __name__ == "__main__":
    main(sys.modules[__name__])
