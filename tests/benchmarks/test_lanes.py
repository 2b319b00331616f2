"""The benchmark of lanes, at a tiny size."""

from __future__ import annotations

import pytest

from benchmarks import harness, lanes
from benchmarks.generation import Generated
from resmoe_dist.errors import UserError
from tests.benchmarks.runs import SMALL
from tests.ranks import run_on_ranks

TINY = ("--layers", 2, "--hidden", 256, "--rows", 48, "--experts", 4, "--dtype", "float32")
# Collectives per layer of two layers: two or three messages each, and one for both.
_OF_DECODE, _OF_EXCHANGE = 2.5, 3.5
LENGTHS = ("--input-len", 5, "--output-len", 4, "--repeats", 2)


def _run(folder, *arguments):
    options = ("--work", folder, *TINY, *LENGTHS, "--ep", 2, "--tp", 1, *arguments)
    return harness.run(lanes, [*map(str, options)], SMALL)["results"]["rows"]


def test_one_prompt_on_every_number_of_lanes(tmp_path):
    one, two = run_on_ranks(2, _run, tmp_path)[0]

    assert (one["lanes"], two["lanes"]) == (1, 2)
    # One lane: two sums per layer, and one of the embedding that the ranks divide. Two lanes: the
    # sizes once, and each layer's messages. Which form is faster depends on the machine's load.
    assert one["collectives"] >= 2
    assert two["collectives"] in (_OF_DECODE, _OF_EXCHANGE)
    assert min(one["above_best"], two["above_best"]) == 0
    assert sorted([one["chosen"], two["chosen"]]) == ["", "yes"]
    for row in (one, two):
        assert len(row["token_s"]["all"]) == len(row["ttft"]["all"]) == 2
        for i in range(2):
            parts = sum(summary["all"][i] for summary in row["parts"].values())
            assert parts == pytest.approx(row["token_s"]["all"][i])


def test_parts_of_a_turn():
    stage = {"router": 1.0, "dispatch": 2.0, "experts": 3.0, "combine": 4.0}
    prefill = dict.fromkeys(stage, 100.0)
    # Two layers, a prefill of 500 s, two decode steps of 30 s for 2 sequences.
    mine = Generated(moments=[500.0, 530.0, 560.0])

    found = lanes.turn_of(mine, [prefill, prefill, *4 * [stage]], 2, 2)

    assert (found["total"], found["ttft"], found["token"]) == (560, 500, 15)
    assert found["parts"] == {"router": 1, "dispatch": 2, "experts": 3, "combine": 4, "rest": 5}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--output-len", 1), "--output-len 1: there is no decode step"),
        (("--lanes", 3), "--lanes 3: the grid has 1$"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, arguments, text):
    options = ("--work", tmp_path, *TINY, *LENGTHS, "--ep", 1, "--tp", 1, *arguments)
    with pytest.raises(UserError, match=text):
        harness.run(lanes, [*map(str, options)], SMALL)
