"""A short soak: random batches on real ranks, with answers and memory watched."""

from __future__ import annotations

import os
import random
import string
from pathlib import Path

import pytest

from benchmarks.processes import memory_of
from benchmarks.soak import Soaked, Traffic, keep_no_words, soak
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.topology import build_topology
from resmoe_dist.runtime.loading import load_model
from tests.models import compress
from tests.ranks import run_on_ranks

SECONDS, WARM_UP = 15, 5
MIB = 1 << 20


def _soak(folder: Path) -> tuple[Soaked, float]:
    place = build_topology(2, 1)
    model = load_model(folder, topology=place)
    alone = load_model(folder) if place.rank == 0 else None
    found = soak(
        model,
        alone,
        load_tokenizer(folder),
        place,
        Traffic(sequences=8, length=64, new_tokens=6),
        seconds=SECONDS,
        check_every=3,
    )
    return found, found.drift(WARM_UP)


@pytest.mark.slow
def test_random_batches_are_answered_and_memory_does_not_drift(embedded_source, tmp_path):
    compress(embedded_source, tmp_path / "c", groups=2)

    results = run_on_ranks(2, _soak, tmp_path / "c")

    (first, _), (second, _) = results
    assert first.batches == second.batches > 10
    assert first.compared > 1
    assert first.prompts > 0
    assert all(drift < 8 * MIB for _, drift in results)


def test_traffic_reaches_its_bounds_and_is_the_same_for_all_ranks():
    batches = Traffic(sequences=5, length=9, new_tokens=3, seed=1).batches()
    again = Traffic(sequences=5, length=9, new_tokens=3, seed=1).batches()
    found = [next(batches) for _ in range(300)]

    assert found == [next(again) for _ in range(300)]
    assert {len(prompts) for prompts, _ in found} == set(range(6))
    assert {len(prompt) for prompts, _ in found for prompt in prompts} == set(range(1, 10))
    assert {new_tokens for _, new_tokens in found} == {1, 2, 3}


@pytest.mark.parametrize("keeps", [True, False], ids=["as loaded", "as soaked"])
def test_a_soaked_tokenizer_keeps_no_prompts(embedded_source, keeps):
    tokenizer, draw = load_tokenizer(embedded_source), random.Random(0)

    def growth() -> int:
        before = memory_of(os.getpid())["anonymous"]
        for _ in range(3000):
            tokenizer("".join(draw.choices(string.ascii_lowercase, k=250)))
        return memory_of(os.getpid())["anonymous"] - before

    if not keeps:
        keep_no_words(tokenizer)
    growth()

    # Beyond what the allocator had left over: 3,000 prompts take 20 MiB.
    assert (growth() > 4 * MIB) == keeps


def test_drift_is_that_between_the_quarters_after_the_start():
    sizes = [900, 100, 110, 120, 130, 140, 150, 160, 170]
    found = Soaked(memory=[(float(second), size) for second, size in enumerate(sizes)])

    # Medians of 160 and 170, and of 100 and 110.
    assert found.drift(1) == 60
    with pytest.raises(ValueError, match="2 batches after 7 s"):
        found.drift(7)
