"""Decode and prefill on grids that this machine cannot hold: a model, not a measurement.

    python -m benchmarks.scaling --work DIR --grids 4x2 8x8 --lanes 1 2 4

    time of a step = computation of one rank, measured here + its collectives on a link, modelled

Computation is that of the grid's rank 0, run without its peers
(`resmoe_dist.testing.child_ranks`): its shard of the compressed model, its share of the batch, and
the real forms of dispatch. The same run counts its collectives and their bytes (`wire.py`).
`links.py` says how long they take: on links given by their data sheets, or on gloo between
processes of this machine, fitted to measured times.

The model takes all ranks to be as busy as rank 0, and nothing to overlap. A rank has one core, or
--threads. For the grids of --check all ranks run here too, and the last table compares. They share
the cores, so computation is multiplied by the threads of all ranks / the cores.

form          of dispatch, forced; `auto` takes the faster one
compute       milliseconds of a step of one rank without its peers; the least, because whatever else
              the machine does only adds to it
per layer     collectives of one rank, and the bytes that it sends to others, attention included
TPOT, TTFT    time of a decode step, and of the prefill of the whole batch; suffix: the link

Legend: B sequences of all lanes, S prompt tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.codec_arguments import add_codec_arguments
from benchmarks.decode import make_compressed
from benchmarks.generation import generate
from benchmarks.harness import logger, main, positive
from benchmarks.links import PRESETS, Link, Network, Timing, fit_link, time_collectives
from benchmarks.model_systems import ModelSystem
from benchmarks.synthetic import add_model_arguments
from benchmarks.tables import Row
from benchmarks.timing import Clock
from benchmarks.wire import Message, WireCount
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.parallel.topology import build_topology, lane_choices
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.testing.child_ranks import run_alone, run_on_ranks
from resmoe_dist.testing.synthetic_model import VOCABULARY

_MEASURED = "measured"
_DECODE_STEPS = 8
_CASE = ("grid", "lanes", "form")
_PHASE = (
    *_CASE,
    "compute ms={0}.compute_ms:.2f",
    "collectives/layer={0}.collectives:.1f",
    "sent/layer={0}.sent_bytes:bytes",
)

TABLES = (
    ("model", *(c.format("decode") for c in _PHASE), "{} TPOT ms (model)=decode.model_ms.*:.2f"),
    ("model", *(c.format("prefill") for c in _PHASE), "{} TTFT ms (model)=prefill.model_ms.*:.1f"),
    (
        *("links", "link", "base us (model)=base_us:.0f", "us per peer (model)=per_peer_us:.1f"),
        *("GB/s (model)=bandwidth:GB/s", "from=origin"),
    ),
    (
        *("check", *_CASE),
        *("TPOT ms (model)=decode.model_ms:.1f", "measured here=decode.measured_ms:.1f"),
        *("ratio=decode.ratio:.2f",),
        *("TTFT ms (model)=prefill.model_ms:.1f", "measured here =prefill.measured_ms:.1f"),
        *("ratio =prefill.ratio:.2f",),
    ),
)


class Grid(NamedTuple):
    """Expert- and tensor-parallel ranks."""

    ep: int
    tp: int

    def __str__(self) -> str:
        return f"{self.ep}x{self.tp}"


@dataclass(frozen=True)
class Work:
    """What a rank of one grid runs: each number of lanes with each form of dispatch that it has."""

    folder: Path
    dtype: str
    grid: Grid
    lanes: Sequence[int]
    batch_size: int
    input_len: int
    repeats: int
    seed: int


@dataclass
class Run:
    """One rank's run of one case.

    moments: of each repeat, seconds from its start to the end of each step; the first is the
    prefill. prefill, decode: collectives of one step.
    """

    lanes: int
    form: str
    moments: list[list[float]]
    prefill: list[Message]
    decode: list[Message]


def parse_grid(text: str) -> Grid:
    """`4x2`: expert-parallel times tensor-parallel ranks, for argparse."""
    ep, _, tp = text.partition("x")
    grid = Grid(positive(ep), positive(tp or "1"))
    if grid.ep * grid.tp < 2:
        raise argparse.ArgumentTypeError(f"{text}: needs two ranks or more")
    return grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_model_arguments(parser, layers=4)
    add_codec_arguments(parser)
    parser.set_defaults(hidden=1024, rows=3584)
    add, grids = parser.add_argument, {"nargs": "*", "type": parse_grid, "metavar": "EPxTP"}
    add("--work", type=Path, required=True, metavar="DIR", help="holds the model; made once")
    add("--grids", **grids, default=[Grid(4, 2), Grid(8, 1), Grid(8, 8)], help="to predict")
    add("--check", **grids, default=[Grid(2, 1), Grid(2, 2)], help="to run here too; may be none")
    add("--lanes", nargs="+", type=positive, default=[1, 2, 4], metavar="L")
    links = [*PRESETS, _MEASURED]
    add("--links", nargs="+", choices=links, default=links, help="between the ranks of a node")
    add("--between", choices=list(PRESETS), default="ib200", help="link between nodes")
    add("--per-node", type=positive, default=8, metavar="N", help="ranks of a node")
    add("--groups", type=positive, default=1, help="centres per layer, over all ranks")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in")
    add("--input-len", type=positive, default=64, metavar="S", help="prompt tokens")
    add("--batch-size", type=positive, default=1, metavar="B", help="sequences, of all lanes")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """model: predictions per grid, lanes and form. links: of the model. check: against measured."""
    folder = make_compressed(args, args.groups)
    links = {name: link for name, link in PRESETS.items() if name in args.links}
    if args.check or _MEASURED in args.links:
        worlds = sorted({2, *(grid.ep * grid.tp for grid in args.check)})
        links[_MEASURED] = _fitted(worlds)
        logger.info("links: done")
    between, rows, check = PRESETS[args.between], [], []
    for grid in args.grids:
        networks = {name: Network(links[name], between, args.per_node) for name in args.links}
        work, threads = work_of(args, folder, grid), args.threads or 1
        runs = run_alone(grid.ep * grid.tp, run_forms, work, threads=threads)
        rows += [predicted(args.layers, grid, run, networks) for run in runs]
        logger.info("%s: done", grid)
    for grid in args.check:
        check += _checked(args, work_of(args, folder, grid), links[_MEASURED])
        logger.info("%s: checked", grid)
    return {"model": rows, "links": [_link_row(link) for link in links.values()], "check": check}


def work_of(args: argparse.Namespace, folder: Path, grid: Grid) -> Work:
    """What to run on a grid."""
    return Work(
        folder,
        args.dtype,
        grid,
        [n for n in lane_choices(grid.ep, 1) if n in args.lanes],
        args.batch_size,
        args.input_len,
        args.repeats,
        args.seed,
    )


def run_forms(work: Work) -> list[Run]:
    """Run all cases on this rank. Collective over the world, which is the grid."""
    generator = torch.Generator().manual_seed(work.seed)
    shape = (work.batch_size, work.input_len)
    ids_BS = torch.randint(VOCABULARY, shape, generator=generator)
    found = []
    for lanes, form in _cases(work.lanes):
        place = build_topology(work.grid.ep, work.grid.tp, lanes)
        model = load_model(
            work.folder, dtype=STORED_DTYPES[work.dtype], topology=place, dispatch=form
        )
        run = partial(generate, ModelSystem(form, model, lanes, place.lane), ids_BS)
        run(2)  # connections, and what kernels prepare
        messages = []
        for new_tokens in (1, 2):
            with WireCount() as wire:
                run(new_tokens)
            messages.append(wire.messages)
        prefill, both = messages
        moments = [run(1 + _DECODE_STEPS).moments for _ in range(work.repeats)]
        found.append(Run(lanes, form, moments, prefill, both[len(prefill) :]))
    return found


def _cases(lanes: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Lanes and forms of dispatch."""
    for count in lanes:
        for form in ("shared_batch",) if count == 1 else ("decode", "exchange"):
            yield count, form


def step_seconds(
    moments: Sequence[Sequence[float]], of: Callable[[list[float]], float]
) -> tuple[float, float]:
    """Of the prefill, and of a decode step: `of` all repeats and steps."""
    return of([each[0] for each in moments]), of([float(s) for m in moments for s in np.diff(m)])


def predicted(
    layers: int, grid: Grid, run: Run, networks: dict[str, Network], sharing: float = 1
) -> Row:
    """A row of the model, from what one rank did without its peers.

    sharing: ranks that share a core.
    """
    row: Row = {"grid": str(grid), "lanes": run.lanes, "form": run.form}
    prefill, decode = step_seconds(run.moments, min)
    for phase, alone, messages in (
        ("prefill", prefill, run.prefill),
        ("decode", decode, run.decode),
    ):
        compute = sharing * alone
        row[phase] = {
            "compute_ms": 1000 * compute,
            "collectives": len(messages) / layers,
            "sent_bytes": sum(message.bytes for message in messages) / layers,
            "model_ms": {
                name: 1000 * (compute + sum(map(network.seconds, messages)))
                for name, network in networks.items()
            },
        }
    return row


def _checked(args: argparse.Namespace, work: Work, link: Link) -> list[Row]:
    """The model beside the same steps of real ranks on gloo, for each case of a grid."""
    ranks, threads = work.grid.ep * work.grid.tp, args.threads or 1
    sharing = max(1, ranks * threads / len(os.sched_getaffinity(0)))
    networks, rows = {_MEASURED: Network(link, link, ranks)}, []
    alone = run_alone(ranks, run_forms, work, threads=threads)
    together = run_on_ranks(ranks, run_forms, work, timeout=None, threads=threads)
    for mine, *real in zip(alone, *together, strict=True):
        row = predicted(args.layers, work.grid, mine, networks, sharing)
        slowest = np.max([run.moments for run in real], axis=0).tolist()
        measured = step_seconds(slowest, statistics.median)
        for phase, seconds in zip(("prefill", "decode"), measured, strict=True):
            model_ms = row[phase]["model_ms"][_MEASURED]
            row[phase] |= {
                "model_ms": model_ms,
                "measured_ms": 1000 * seconds,
                "ratio": model_ms / (1000 * seconds),
            }
        rows.append(row)
    return rows


def _fitted(worlds: Sequence[int]) -> Link:
    """gloo between processes of this machine, from worlds of several sizes."""
    timings: list[Timing] = []
    for world in worlds:
        timings += run_on_ranks(world, time_collectives, timeout=None, threads=1)[0]
    sizes = ", ".join(map(str, worlds))
    return fit_link(_MEASURED, timings, f"gloo here, {sizes} ranks")


def _link_row(link: Link) -> Row:
    return {
        "link": link.name,
        "base_us": 1e6 * link.base,
        "per_peer_us": 1e6 * link.per_peer,
        "bandwidth": link.bandwidth,
        "origin": link.origin,
    }


if __name__ == "__main__":
    main(sys.modules[__name__])
