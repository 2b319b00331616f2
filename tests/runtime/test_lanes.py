"""The number of lanes is chosen by time, alike on all ranks, without changing the text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.topology import Topology, build_topology
from resmoe_dist.runtime import lanes
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.lanes import OnLanes, Prompts, fastest_lanes, predicted_seconds
from resmoe_dist.runtime.loading import experts_by_module, load_model
from tests.checkpoints.damage import copy_of
from tests.ranks import run_on_ranks
from tests.runtime.test_generation import PROMPTS, complete, save_tokenizer

# ep 2 with two tensor-parallel ranks: one lane of four ranks, or two of two.
NUMBERS = (1, 2)


def _choose(folder: Path, first: int, step_of: dict[int, float] | None) -> tuple:
    """The chosen lanes, whether the experts are those of the first model, and this lane's text.

    step_of: seconds of a step by number of lanes, instead of the measured ones.
    """
    place = build_topology(2, 2, first)
    load = partial(load_model, folder)
    model = load(topology=place)
    before = experts_by_module(model)
    prompts = Prompts(load_tokenizer(folder), PROMPTS, GenerationOptions(5))
    if step_of is not None:
        lanes.timed_steps = lambda loaded, _: (0.01, step_of[loaded.place.lanes])
    chosen = fastest_lanes(
        OnLanes(model, place),
        lambda place, held: load(topology=place, experts_of=held),
        prompts,
    )
    output = generate_on_lane(
        chosen.model, prompts.tokenizer, PROMPTS, chosen.place, prompts.options
    )
    same = all(each is before[name] for name, each in experts_by_module(chosen.model).items())
    return chosen.place.lanes, same, output.completions


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    made = copy_of(pristine, tmp_path / "c")
    save_tokenizer(made)
    return made


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("best", NUMBERS)
def test_the_lanes_with_the_fastest_steps_are_chosen(folder, first, best):
    step_of = {number: 0.1 if number == best else 0.11 for number in NUMBERS}

    found = run_on_ranks(4, _choose, folder, first, step_of)

    assert [lanes for lanes, *_ in found] == 4 * [best]
    assert all(same for _, same, _ in found)


@pytest.mark.slow
def test_measured_lanes_are_the_same_on_all_ranks_and_give_the_same_text(folder):
    expected = [text[:5] for text in complete(folder)[0]]

    found = run_on_ranks(4, _choose, folder, 2, None)

    assert len({lanes for lanes, *_ in found}) == 1
    texts: dict[int, str] = {}
    for *_, mine in found:
        texts |= mine
    assert [texts[i] for i in range(len(PROMPTS))] == expected


def test_prediction_counts_batches_of_the_largest_lane():
    options = GenerationOptions(max_new_tokens=11, batch=4)
    prompts = Prompts(None, ["x"] * 9, options)

    # Nine prompts: one lane has three batches, two lanes have five prompts in two batches.
    one, two = Topology(ep=2, lane_ep=2), Topology(ep=2, lane_ep=1)
    assert predicted_seconds(one, prompts, 2.0, 0.1) == pytest.approx(3 * (2.0 + 10 * 0.1))
    assert predicted_seconds(two, prompts, 2.0, 0.1) == pytest.approx(2 * (2.0 + 10 * 0.1))
