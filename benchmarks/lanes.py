"""One grid with each number of lanes: time per token by part, and what `infer` would choose.

    python -m benchmarks.lanes --work DIR --ep 4 --tp 2 --lanes 1 2 4
    python -m benchmarks.lanes --model FOLDER --ep 4 --tp 2 --batch-size 8

All numbers of lanes share the experts of one launch, and take turns at generating from the same
random prompts. Every decode step of a turn is divided into the parts of its MoE layers and the
rest. A rank without a sequence runs the first one, which does not count.

ms/token      of a decode step / its sequences: the slowest rank's
rest          attention, norms, the head and everything else: a step without the other parts
router, …     sums over the MoE layers; the mean over ranks; dispatch and combine include waiting
collectives   of one rank in a decode step / MoE layers, attention included
above best    seconds of all steps, prefill included / the least of all numbers of lanes - 1: the
              median of the turns
auto          whether `infer` without `--lanes` takes this number, by its own short measurement

Legend: B sequences of all lanes, S prompt tokens.
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

from benchmarks.codec_arguments import add_codec_arguments
from benchmarks.decode import make_compressed
from benchmarks.generation import Generated, generate, slowest_steps
from benchmarks.harness import logger, main, positive
from benchmarks.model_systems import ModelSystem
from benchmarks.ranks import RanksClock, add_grid_arguments, barrier, join_grid, of_all_ranks, rank
from benchmarks.stages import STAGES, stage_seconds
from benchmarks.steps import collectives_of_step
from benchmarks.synthetic import add_model_arguments
from benchmarks.tables import Row
from benchmarks.timing import Clock, summary
from resmoe_dist.checkpoints.entries import STORED_DTYPES
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.entry_point import launched_rank
from resmoe_dist.parallel.topology import build_topology, lane_choices
from resmoe_dist.runtime.generation import GenerationOptions
from resmoe_dist.runtime.lanes import OnLanes, Prompts, fastest_lanes
from resmoe_dist.runtime.loading import load_model

_PARTS = ("rest", *STAGES)
TABLES = (
    (
        *("rows", "lanes", "ms/token=token_s:ms", "TTFT ms=ttft:ms"),
        *(f"{part}=parts.{part}:ms" for part in _PARTS),
        *("collectives/layer=collectives:.1f", "above best=above_best:.1%", "auto=chosen"),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_grid_arguments(parser, ep=4, tp=2)
    add_model_arguments(parser, layers=4)
    add_codec_arguments(parser)
    parser.set_defaults(hidden=1024, rows=3584, repeats=5, seconds=300)
    add = parser.add_argument
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--work", type=Path, metavar="DIR", help="holds the model; made once")
    place.add_argument("--model", type=Path, metavar="DIR", help="a compressed folder instead")
    add("--lanes", nargs="+", type=positive, metavar="L", help="default: all that the grid has")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in")
    add("--batch-size", type=positive, default=1, metavar="B", help="sequences, of all lanes")
    add("--input-len", type=positive, default=64, metavar="S", help="prompt tokens")
    add("--output-len", type=positive, default=32, metavar="N", help="new tokens per sequence")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per number of lanes.

    Raises UserError for numbers of lanes that the grid does not have, or fewer than two new tokens.
    """
    if args.output_len < 2:
        raise UserError("--output-len 1: there is no decode step to measure; give 2 or more")
    if args.model is None and launched_rank() == 0:
        make_compressed(args, args.ep)
    place = join_grid(args)
    barrier()
    folder = args.model or make_compressed(args, args.ep)
    choices = lane_choices(place.ep, place.dp)
    numbers = args.lanes or choices
    if unknown := sorted(set(numbers) - set(choices)):
        raise UserError(f"--lanes {unknown[0]}: the grid has {' or '.join(map(str, choices))}")
    loaded: dict[int, OnLanes] = {}
    # All choices: `infer` would try them too.
    for number in choices:
        grid = place if number == place.lanes else build_topology(place.ep, place.tp, number)
        held = next((each.model for each in loaded.values()), None)
        model = load_model(folder, dtype=STORED_DTYPES[args.dtype], topology=grid, experts_of=held)
        # No text ends early, so that the ranks need not agree on when to stop.
        model.generation_config.eos_token_id = None
        loaded[number] = OnLanes(model, grid)
        if rank() == 0:
            logger.info("lanes %d: loaded", number)
    chosen = _choice(args, folder, loaded)
    wanted = {number: loaded[number] for number in numbers}
    rows = measure_lanes(args, RanksClock(clock), wanted)
    for row in rows:
        row["chosen"] = "yes" if row["lanes"] == chosen else ""
    return {"rows": rows}


def measure_lanes(
    args: argparse.Namespace, clock: RanksClock, loaded: dict[int, OnLanes]
) -> list[Row]:
    """A row for each number of lanes."""
    systems = {
        f"{number} lanes": ModelSystem(
            f"{number} lanes", each.model, number, each.place.lane, ranks_per_copy=each.place.tp
        )
        for number, each in loaded.items()
    }
    layers = len(next(iter(systems.values())).parts)
    found: dict[str, list[Row]] = {name: [] for name in systems}
    seeds = count(1000 * args.seed)
    vocabulary = next(iter(loaded.values())).model.config.vocab_size

    def prompts() -> torch.Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        shape = (args.batch_size, args.input_len)
        return torch.randint(3, vocabulary, shape, generator=generator)

    def prepare() -> dict[str, Callable[[], None]]:
        ids_BS = prompts()

        def run(name: str) -> None:
            made: list[Generated] = []
            seconds = stage_seconds(
                lambda: made.append(generate(systems[name], ids_BS, args.output_len)),
                systems[name].parts,
            )
            found[name].append(turn_of(made[0], seconds, layers, args.batch_size))

        return {name: partial(run, name) for name in systems}

    for name, system in systems.items():
        # Connections, and what kernels prepare.
        generate(system, prompts(), 2)
        found[name].clear()
    clock.compare(prepare)
    totals = {
        name: statistics.median(turn["total"] for turn in turns) for name, turns in found.items()
    }
    return [
        {
            "lanes": number,
            "token_s": summary([turn["token"] for turn in found[name]]),
            "ttft": summary([turn["ttft"] for turn in found[name]]),
            "parts": {
                part: summary([turn["parts"][part] for turn in found[name]]) for part in _PARTS
            },
            "collectives": collectives_of_step(systems[name], prompts()) / layers,
            "above_best": totals[name] / min(totals.values()) - 1,
        }
        for number, name in zip(loaded, systems, strict=True)
    ]


def turn_of(mine: Generated, seconds: list[dict[str, float]], layers: int, batch_size: int) -> Row:
    """Seconds of one turn: `total`, `ttft`, and of a decode step per token: `token`, `parts`.

    mine: this rank's steps. seconds: its stages, layer by layer in each step, the prefill's first.
    Collective over the ranks.
    """
    moments = slowest_steps(mine)
    token = float(np.median(np.diff(moments))) / batch_size
    of_steps = [seconds[i : i + layers] for i in range(layers, len(seconds), layers)]
    sums = {
        stage: statistics.median(sum(layer[stage] for layer in step) for step in of_steps)
        for stage in STAGES
    }
    ranks = of_all_ranks(sums)
    parts = {
        stage: statistics.fmean(each[stage] for each in ranks) / batch_size for stage in STAGES
    }
    return {
        "total": float(moments[-1]),
        "ttft": float(moments[0]),
        "token": token,
        "parts": {"rest": token - sum(parts.values()), **parts},
    }


def _choice(args: argparse.Namespace, folder: Path, loaded: dict[int, OnLanes]) -> int:
    """The number of lanes that `infer` takes for as many prompts of this length."""
    # One token is the tokenizer's first; each character of the others is one.
    texts = [chr(ord("a") + i % 26) * max(1, args.input_len - 1) for i in range(args.batch_size)]
    options = GenerationOptions(args.output_len, batch=args.batch_size)
    prompts = Prompts(load_tokenizer(folder), texts, options)
    # As `infer` begins: the most lanes that all have a prompt.
    first = max(number for number in loaded if number <= max(args.batch_size, min(loaded)))
    found = fastest_lanes(loaded[first], lambda place, _: loaded[place.lanes].model, prompts)
    return found.place.lanes


if __name__ == "__main__":
    main(sys.modules[__name__])
