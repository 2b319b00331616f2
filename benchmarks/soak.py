"""Hours of random requests on ranks: does memory grow, does it hang, are answers right?

    python -m benchmarks.soak --ep 4 --tp 2 --minutes 30
    deepspeed benchmarks/soak.py --ep 4 --tp 2 --minutes 30

Every batch has a random number of prompts, from none to --sequences, of random lengths from 1 to
--length tokens, and asks for a random number of new tokens. Small batches are more frequent. A
space ends a sequence, so lanes finish at different steps, and some have nothing to do. Every
--check-every batches one completion is compared with that of a single process, in float32. A
different one ends the run, as does memory that drifts by more than --limit.

memory      anonymous bytes of a rank after each batch, freed memory returned first. `first` is the
            most in the first minute (--warm-up), `after` the most since. Without the tokenizer's
            cache of up to 10,000 words: a tokenizer of bytes keeps whole prompts in it, 40 MiB
drift       median of the last quarter of what follows, minus the median of its first quarter
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import string
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    # As a script. Python would look for modules in this folder, whose names others have too.
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import logger, main, positive
from benchmarks.processes import memory_of
from benchmarks.ranks import add_grid_arguments, join_grid, largest, of_all_ranks, rank
from benchmarks.tables import Row
from benchmarks.timing import Clock
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.heap import return_freed_memory
from resmoe_dist.parallel.dispatch import FORMS
from resmoe_dist.parallel.entry_point import launched_rank
from resmoe_dist.parallel.topology import Topology, build_topology
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.testing.embedded import embedded_checkpoint

_MIB = 1 << 20
_LETTERS = string.ascii_lowercase + "_(). \n"
_SAID_EVERY = 30

TABLES = (
    ("runs", "seconds:.0f", "batches", "prompts", "prompt_tokens", "new_tokens", "compared"),
    (
        *("ranks", "rank", "lane", "first=first_bytes:bytes", "after=after_bytes:bytes"),
        *("drift MiB=drift_mib:.2f", "open files=files"),
    ),
)


@dataclass(frozen=True)
class Traffic:
    """Bounds of random batches: prompts, tokens of a prompt, new tokens of each prompt."""

    sequences: int = 64
    length: int = 512
    new_tokens: int = 16
    seed: int = 0

    def batches(self) -> Iterator[tuple[list[str], int]]:
        """Prompts and new tokens of each batch, the same on all ranks. Never ends."""
        draw = random.Random(self.seed)
        while True:
            # Squares: small batches and short prompts are more frequent.
            count = round(self.sequences * draw.random() ** 2)
            longest = max(1, round(self.length * draw.random() ** 2))
            prompts = [
                "".join(draw.choices(_LETTERS, k=draw.randint(1, longest))) for _ in range(count)
            ]
            yield prompts, draw.randint(1, self.new_tokens)


@dataclass
class Soaked:
    """What one rank saw. memory: seconds from the start, and anonymous bytes then."""

    batches: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    compared: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)

    def drift(self, warm_up: float) -> float:
        """Bytes by which memory grew after `warm_up` seconds: between the first and last quarter.

        Raises ValueError if there are fewer than four samples.
        """
        after = [size for moment, size in self.memory if moment >= warm_up]
        if len(after) < 4:
            raise ValueError(f"{len(after)} batches after {warm_up:g} s, at least 4 are needed")
        quarter = len(after) // 4
        return statistics.median(after[-quarter:]) - statistics.median(after[:quarter])


def soak(
    model: PreTrainedModel,
    alone: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    topology: Topology,
    traffic: Traffic,
    seconds: float,
    check_every: int = 10,
) -> Soaked:
    """Serve random batches for a time. Collective over the grid.

    alone: the same model in one process, on rank 0. Raises RuntimeError on all ranks for a
    completion that differs from its own.
    """
    end_of_text = tokenizer(" ")["input_ids"][-1]
    for each in (model, alone):
        if each is not None:
            each.generation_config.eos_token_id = end_of_text
    found, began, said = Soaked(), time.monotonic(), 0.0
    keep_no_words(tokenizer)
    for prompts, new_tokens in traffic.batches():
        elapsed = largest(time.monotonic() - began)
        if elapsed > seconds:
            return found
        options = GenerationOptions(new_tokens, batch=traffic.sequences)
        output = generate_on_lane(model, tokenizer, prompts, topology, options)
        found.batches += 1
        found.prompts += len(prompts)
        found.prompt_tokens += sum(len(tokenizer(each)["input_ids"]) for each in prompts)
        found.new_tokens += output.new_tokens
        if prompts and found.batches % check_every == 0:
            chosen = 7 * found.compared % len(prompts)
            prompt, expected = prompts[chosen], None
            if alone is not None:
                expected = _complete(alone, tokenizer, prompt, new_tokens)
            _compare(output.completions.get(chosen), expected, prompt)
            found.compared += 1
        return_freed_memory()
        found.memory.append((elapsed, memory_of(os.getpid()).get("anonymous", 0)))
        if rank() == 0 and elapsed - said > _SAID_EVERY:
            said = elapsed
            now = found.memory[-1][1] / _MIB
            logger.info("%d s: %d batches, rank 0 has %.1f MiB", elapsed, found.batches, now)
    raise AssertionError("traffic never ends")


def keep_no_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch off the cache of a tokenizer's words, if it has one, so that it does not look like a
    leak."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if hasattr(model, "_resize_cache"):
        model._resize_cache(0)


@torch.no_grad()
def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> str:
    """The greedy completion of one prompt by this process alone."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    output_BS = model.generate(
        input_ids=ids,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output_BS[0, ids.shape[1] :], skip_special_tokens=True)


def _compare(mine: str | None, expected: str | None, prompt: str) -> None:
    """Compare the completions of all ranks that have one with the expected one of rank 0."""
    completions = {each for each in of_all_ranks(mine) if each is not None}
    right = of_all_ranks(expected)[0]
    if completions != {right}:
        raise RuntimeError(f"{prompt!r} gave {sorted(completions)}, one process gives {right!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_grid_arguments(parser, ep=4, tp=2)
    add, bounds = parser.add_argument, Traffic()
    add("--model", type=Path, metavar="DIR", help="compressed folder (default: the embedded one)")
    add("--lanes", type=positive, metavar="L", help="default: one per expert-parallel rank")
    add("--dispatch", choices=FORMS, default="auto")
    add("--minutes", type=float, default=30)
    add("--warm-up", type=float, default=60, metavar="S", help="seconds, in which memory may grow")
    add("--sequences", type=positive, default=bounds.sequences, metavar="B", help="at most")
    add("--length", type=positive, default=bounds.length, metavar="S", help="at most")
    add("--new-tokens", type=positive, default=bounds.new_tokens, metavar="N", help="at most")
    add("--check-every", type=positive, default=10, metavar="N", help="compare one of N batches")
    add("--limit", type=float, default=16, metavar="MIB", help="drift that is an error")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """runs: what was served. ranks: memory of each."""
    if launched_rank() == 0 and args.model is None:
        # Made by one process, which has all cores.
        embedded_checkpoint(args.ep)
    place = join_grid(args)
    if args.lanes is not None:
        place = build_topology(args.ep, args.tp, args.lanes)
    folder = args.model or embedded_checkpoint(args.ep)
    model = load_model(folder, dtype=torch.float32, topology=place, dispatch=args.dispatch)
    alone = load_model(folder, dtype=torch.float32) if rank() == 0 else None
    traffic = Traffic(args.sequences, args.length, args.new_tokens, args.seed)
    tokenizer = load_tokenizer(folder)
    found = soak(model, alone, tokenizer, place, traffic, 60 * args.minutes, args.check_every)
    rows = of_all_ranks(_row(place, found, args.warm_up))
    drifted = [row["rank"] for row in rows if row["drift_mib"] > args.limit]
    if drifted:
        worst = max(row["drift_mib"] for row in rows)
        raise RuntimeError(f"memory of ranks {drifted} drifts, by up to {worst:.1f} MiB")
    tokens = sum(of_all_ranks(found.new_tokens if place.lane_rank == 0 else 0))
    run = {
        "seconds": found.memory[-1][0],
        "batches": found.batches,
        "prompts": found.prompts,
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": tokens,
        "compared": found.compared,
    }
    return {"runs": [run], "ranks": rows}


def _row(place: Topology, found: Soaked, warm_up: float) -> Row:
    after = [size for moment, size in found.memory if moment >= warm_up]
    return {
        "rank": place.rank,
        "lane": place.lane,
        "first_bytes": max(size for moment, size in found.memory if moment < warm_up),
        "after_bytes": max(after, default=0),
        "drift_mib": found.drift(warm_up) / _MIB,
        "files": len(os.listdir("/proc/self/fd")),
        "memory": found.memory,
    }


if __name__ == "__main__":
    main(sys.modules[__name__])
