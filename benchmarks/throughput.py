"""A whole model on several ranks: ours beside DeepSpeed's MoE and transformers' expert parallelism.

    python -m benchmarks.throughput --work DIR --ep 4 --tp 2
    deepspeed benchmarks/throughput.py --work DIR --ep 4 --tp 2

Makes a Mixtral with random weights, compresses it, restores that, and stores the restored experts
with codec `dense`; all stay in DIR. Then every system (see `model_systems.py`) generates greedily
from the same random prompts, in one launch and in turns. All systems hold the same weights. A
turn's time is that of the slowest rank. No sequence ends early, so the ranks need not agree on
when to stop; launch/infer.py adds a small message per step if there are several lanes and texts can
end early.

A system divides a batch over its lanes, over all ranks (DeepSpeed), or not at all. A rank without a
sequence of the batch runs the first one, which does not count.

TTFT          from the start to the first new token of the batch: the prefill
TPOT          time per output token: between two steps of the batch, over all batches
tokens/s      prefill: prompt tokens / TTFT; decode: new tokens but the first / the time after TTFT;
              medians
equal         share of new tokens that equal the first system's. In float32 all must
wire          of a decode step, per MoE layer, attention included: collectives of one rank, and
              bytes that leave ranks for others, per token, all ranks together (see `wire.py`)
stages        of a decode step, per MoE layer: the mean over ranks and steps
empty rows    sent: rows of zeros / other rows, in what all ranks give to collectives of MoE layers.
              Fixed sizes send them for lanes with fewer tokens and experts with fewer copies; sums
              for tokens that have no expert on a rank are zero too
padding       computed: rows that experts compute without a token of the batch / those with one (see
              `loads.py`): capacity, alignment, and sequences that ranks without one run
imbalance     the largest number of routed copies / the mean, over experts and over ranks; the mean
              over layers and steps
resident      bytes of the model's tensors on the rank that has most
peak          resident and what the process grew by while the system ran: at least so much, because
              memory that the process had freed before may be used again

Legend: B sequences, S prompt tokens, N new tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

if not __package__:
    # As a script. Python would look for modules in this folder, whose names others have too.
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import torch
from torch import Tensor

from benchmarks import decode
from benchmarks.codec_arguments import add_codec_arguments
from benchmarks.generation import Generated, generate, slowest_steps, tokens_of_all
from benchmarks.harness import logger, main, positive
from benchmarks.model_systems import (
    ModelSystem,
    autoep_model_system,
    deepspeed_model_system,
    one_rank_systems,
    our_model_systems,
    transformers_model_systems,
)
from benchmarks.ranks import (
    RanksClock,
    add_grid_arguments,
    barrier,
    join_grid,
    of_all_ranks,
    rank,
)
from benchmarks.steps import watch_steps
from benchmarks.synthetic import add_model_arguments
from benchmarks.tables import Row
from benchmarks.timing import Clock, summary
from benchmarks.ways import DENSE
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.checkpoints.format import is_compressed
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.errors import first_line
from resmoe_dist.launch.compress import compress
from resmoe_dist.parallel.dispatch import FORMS
from resmoe_dist.parallel.entry_point import launched_rank
from resmoe_dist.parallel.topology import build_topology
from resmoe_dist.runtime.rank_memory import resident_bytes
from resmoe_dist.testing.synthetic_model import VOCABULARY

KINDS = ("all_reduce", "all_to_all")
_SYSTEMS = ("one_rank", "resmoe", "deepspeed", "autoep", "transformers")
# Decode steps that are counted and watched.
_WATCHED_STEPS = 4

TABLES = (
    (
        *("rows", "system", "TTFT ms=ttft:ms", "TPOT ms p50=tpot.p50:.1f", "p95=tpot.p95:.1f"),
        *("prefill tokens/s=prefill_rate:.1f", "decode tokens/s=decode_rate:.1f"),
        *("equal=equal_tokens:.0%", "resident=resident_bytes:bytes", "peak=peak_bytes:bytes"),
    ),
    (
        *("rows", "system", "collectives/layer=wire.collectives:.1f"),
        *("wire/token/layer=wire.bytes_per_token:bytes", "{} ms=stages_ms.*:.2f"),
    ),
    *(
        (
            *("rows", f"{phase}=system", f"empty rows sent={phase}.empty_rows:.0%"),
            f"padding computed={phase}.padding:.0%",
            *(f"imbalance of {each}={phase}.imbalance.{each}:.2f" for each in ("experts", "ranks")),
        )
        for phase in ("prefill", "decode")
    ),
    ("skipped", "left out=system", "because=reason"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_grid_arguments(parser, ep=4, tp=2)
    add_model_arguments(parser, layers=4)
    add_codec_arguments(parser)
    parser.set_defaults(hidden=1024, rows=3584, repeats=3, seconds=300)
    add, text = parser.add_argument, "holds the source, compressed, restored and dense model"
    add("--work", type=Path, required=True, metavar="DIR", help=f"{text}; each is made once")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in")
    add("--input-len", type=positive, default=64, metavar="S", help="prompt tokens")
    add("--output-len", type=positive, default=32, metavar="N", help="new tokens per sequence")
    add("--batch-size", type=positive, default=8, metavar="B", help="sequences at a time, of all")
    add("--num-prompts", type=positive, metavar="P", help="per turn (default: one batch)")
    add("--dispatch", choices=FORMS, default="auto", help="our form, if the lanes allow it")
    add("--systems", nargs="+", choices=_SYSTEMS, default=list(_SYSTEMS))
    add("--experts-implementation", nargs="+", choices=DENSE, default=["eager", "grouped_mm"])
    add("--ep-implementation", nargs="+", choices=KINDS, default=list(KINDS))


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per system. skipped: systems that cannot serve, with the reason."""
    if launched_rank() == 0:
        # Made by one process, which has all cores.
        make_folders(args)
    place = join_grid(args)
    barrier()
    folders = make_folders(args)
    clock = RanksClock(clock)
    topologies = [place]
    if place.replica_lanes > 1:
        topologies.append(build_topology(args.ep, args.tp, lanes=place.dp))
    systems, skipped = _load(args, topologies, *folders)
    return {"rows": measure_systems(args, clock, systems, skipped), "skipped": skipped}


def make_folders(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The compressed and the restored model, and the restored one with codec `dense`."""
    compressed, restored = decode.make_folders(args, ep=args.ep)
    dense = restored.with_name(f"dense-{args.dtype}")
    if not is_compressed(dense):
        logger.info("storing dense")
        compress(CompressConfig(source=restored, output=dense, ep=args.ep, method="dense"))
    return compressed, restored, dense


def _load(
    args: argparse.Namespace, topologies: list, compressed: Path, restored: Path, dense: Path
) -> tuple[list[ModelSystem], list[Row]]:
    """The systems of the options; and those that cannot be loaded, with the reason."""
    dtype, experts = STORED_DTYPES[args.dtype], args.experts_implementation
    loaders: dict[str, Callable[[], list[ModelSystem]]] = {
        "one_rank": lambda: list(one_rank_systems(restored, dtype, experts)),
        "resmoe": lambda: list(
            our_model_systems(compressed, dense, dtype, topologies, args.dispatch)
        ),
        "deepspeed": lambda: [deepspeed_model_system(restored, dtype)],
        "autoep": lambda: [autoep_model_system(restored, dtype)],
        "transformers": lambda: list(
            transformers_model_systems(restored, dtype, experts, args.ep_implementation)
        ),
    }
    systems, skipped = [], []
    for name in args.systems:
        try:
            systems += loaders[name]()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if name == "resmoe":
                raise
            skipped.append({"system": name, "reason": first_line(error)})
        if rank() == 0:
            logger.info("%s: loaded", name)
    return systems, skipped


def measure_systems(
    args: argparse.Namespace, clock: RanksClock, systems: list[ModelSystem], skipped: list[Row]
) -> list[Row]:
    """A row for each system that serves; the others are added to `skipped`.

    Raises RuntimeError if a system generates different tokens in float32.
    """
    prompts, running = _Prompts(args), []
    for system in systems:
        reason = _refusal(system, prompts.batch())
        if reason is None:
            running.append(system)
        elif system.name.startswith("resmoe"):
            raise RuntimeError(f"{system.name}: {reason}")
        else:
            skipped.append({"system": system.name, "reason": reason})
    watch = partial(watch_steps, layers=args.layers, steps=min(_WATCHED_STEPS, args.output_len - 1))
    watched = {system.name: watch(system, prompts.batch()) for system in running}
    generated: dict[str, list[Generated]] = {system.name: [] for system in running}
    batches = -(-(args.num_prompts or args.batch_size) // args.batch_size)

    def prepare() -> dict[str, Callable[[], None]]:
        given = [prompts.batch() for _ in range(batches)]

        def run(system: ModelSystem) -> None:
            for ids_BS in given:
                generated[system.name].append(generate(system, ids_BS, args.output_len))

        return {system.name: partial(run, system) for system in running}

    clock.compare(prepare)
    first, rows = running[0], []
    expected = [tokens_of_all(first, each, args.batch_size) for each in generated[first.name]]
    for system in running:
        found = generated[system.name]
        tokens = [tokens_of_all(system, each, args.batch_size) for each in found]
        equal = statistics.fmean(
            float((a_BN == b_BN).float().mean())
            for a_BN, b_BN in zip(expected, tokens, strict=True)
        )
        if args.dtype == "float32" and equal < 1:
            raise RuntimeError(f"{system.name} generates other tokens than {first.name} in float32")
        resident = 0 if system.model is None else resident_bytes(system.model)
        peak = resident + max(each.growth for each in found)
        rows.append(
            {
                "system": system.name,
                "batches": system.batches,
                **_figures(args, found),
                "equal_tokens": equal,
                **watched[system.name],
                "resident_bytes": max(of_all_ranks(resident)),
                "peak_bytes": max(of_all_ranks(peak)),
            }
        )
    return rows


def _refusal(system: ModelSystem, ids_BS: Tensor) -> str | None:
    """Why a system cannot generate; None if it can. The same on all ranks."""
    reason = ""
    try:
        generate(system, ids_BS, 2)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = first_line(error)
    return next((each for each in of_all_ranks(reason) if each), None)


class _Prompts:
    """Random prompts, the same on all ranks and for all systems."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._shape = (args.batch_size, args.input_len)
        self._seeds = count(1000 * args.seed)

    def batch(self) -> Tensor:
        """The next ones: [B, S]."""
        generator = torch.Generator().manual_seed(next(self._seeds))
        return torch.randint(VOCABULARY, self._shape, generator=generator)


def _figures(args: argparse.Namespace, found: list[Generated]) -> Row:
    """Times and rates of a system from its batches."""
    steps = [slowest_steps(each) for each in found]
    ttft = summary([float(each[0]) for each in steps])
    between = [float(each) for one in steps for each in np.diff(one)]
    B, N = args.batch_size, args.output_len
    row: Row = {"ttft": ttft, "prefill_rate": B * args.input_len / ttft["median"]}
    if N > 1:
        rest = statistics.median(float(each[-1] - each[0]) for each in steps)
        row["tpot"] = {
            f"p{p}": 1000 * float(np.percentile(between, p)) for p in (50, 95)
        }  # in milliseconds
        row["decode_rate"] = B * (N - 1) / rest
    return row


if __name__ == "__main__":
    main(sys.modules[__name__])
