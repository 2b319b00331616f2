"""Lanes run as many steps as each other, and agree on that with few messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.wire import WireCount
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.topology import SINGLE_PROCESS, build_topology
from resmoe_dist.runtime.generation import GenerationOptions, generate_batch, lane_batches
from resmoe_dist.runtime.loading import load_model
from tests.checkpoints.damage import copy_of
from tests.models import compress
from tests.ranks import run_on_ranks
from tests.runtime.test_generation import save_tokenizer

OPTIONS = GenerationOptions(max_new_tokens=6)
PROMPTS = ["ABC", "HELLO", "Q"]


def _alone(folder: Path, prompts: list[str], ends: list[int] | None) -> list[list[int]]:
    """The new tokens of each prompt in one process, one prompt at a time."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.generation_config.eos_token_id = ends
    numbers = [range(i, i + 1) for i in range(len(prompts))]
    return [
        generate_batch(model, tokenizer, prompts, each, SINGLE_PROCESS, OPTIONS).texts[0]
        for each in numbers
    ]


def _on_lanes(folder: Path, prompts: list[str], ends: list[int] | None) -> tuple[list, int, int]:
    """On two lanes: the new tokens, steps, and messages beyond those of the passes."""
    place = build_topology(2, 1)
    model, tokenizer = load_model(folder, topology=place), load_tokenizer(folder)
    model.generation_config.eos_token_id = ends
    (numbers,) = lane_batches(len(prompts), place, 8)
    passes: list[int] = []
    with WireCount() as wire:
        model.register_forward_pre_hook(lambda *_: passes.append(-wire.collectives))
        model.register_forward_hook(lambda *_: passes.append(wire.collectives))
        found = generate_batch(model, tokenizer, prompts, numbers, place, OPTIONS)
    assert len(found.moments) == len(passes) // 2
    return found.texts, len(found.moments), wire.collectives - sum(passes)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    made = copy_of(pristine, tmp_path / "c")
    save_tokenizer(made)
    return made


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["2 lanes", "1 of 2 lanes"])
def test_lanes_whose_texts_cannot_end_early_send_nothing_to_agree(folder, prompts):
    expected = _alone(folder, prompts, None)

    first, second = run_on_ranks(2, _on_lanes, folder, prompts, None)

    assert (first[0], second[0]) == (expected[::2], expected[1::2])
    assert first[1:] == second[1:] == (6, 0)


def test_lanes_that_end_at_different_steps_run_until_the_last_one(folder):
    free = _alone(folder, PROMPTS, None)
    # Ends the second lane's text at its second token at the latest.
    end = free[1][1]
    expected = _alone(folder, PROMPTS, [end])
    lengths = [len(ids) for ids in expected]
    assert lengths[1] <= 2 < max(lengths)

    found = run_on_ranks(2, _on_lanes, folder, PROMPTS, [end])

    assert [found[0][0], found[1][0]] == [expected[::2], expected[1::2]]
    # One message after every step but the last of all.
    for _, steps, messages in found:
        assert steps == max(lengths)
        assert messages == min(steps, OPTIONS.max_new_tokens - 1)


def test_lanes_that_all_end_early_stop(folder):
    free = _alone(folder, PROMPTS[:1], None)
    end = free[0][3]
    steps = free[0].index(end) + 1

    found = run_on_ranks(2, _on_lanes, folder, PROMPTS[:1], [end])

    # The lane without a prompt takes part in all steps.
    assert [each[0] for each in found] == [[free[0][:steps]], []]
    assert [each[1:] for each in found] == [(steps, steps)] * 2


def test_an_encoder_decoder_waits_without_its_encoder(family_folder, tmp_path):
    made = tmp_path / "c"
    compress(family_folder("switch"), made, groups=2)
    save_tokenizer(made)
    expected = _alone(made, PROMPTS[:1], None)

    found = run_on_ranks(2, _on_lanes, made, PROMPTS[:1], None)

    assert [each[0] for each in found] == [expected, []]
    assert torch.tensor(expected).shape == (1, OPTIONS.max_new_tokens)
