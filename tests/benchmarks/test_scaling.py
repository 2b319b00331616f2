"""The model of grids: what a rank without its peers counts, and what is made of it."""

from __future__ import annotations

import argparse
import statistics

import pytest

from benchmarks import scaling
from benchmarks.links import Link, Network
from benchmarks.scaling import Grid, Run, Work, parse_grid, predicted, run_forms, step_seconds
from benchmarks.wire import Message
from resmoe_dist.testing.child_ranks import run_alone, run_on_ranks
from tests.benchmarks.runs import results_of
from tests.models import FAMILIES, compress, save_family

TINY = ("--layers", 2, "--hidden", 256, "--rows", 40, "--experts", 4, "--input-len", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("scaling")
    save_family(FAMILIES["mixtral"], made / "s", vocab_size=scaling.VOCABULARY)
    compress(made / "s", made / "c", groups=2)
    return made / "c"


@pytest.fixture(scope="module")
def runs(folder):
    """Every case of a 2x2 grid, by rank 0 without peers and by rank 0 of four ranks."""
    work = Work(folder, "float32", Grid(2, 2), [1, 2], 2, 5, repeats=1, seed=0)
    alone = run_alone(4, run_forms, work, threads=1)
    return alone, run_on_ranks(4, run_forms, work, threads=1)[0]


def test_a_rank_without_peers_counts_what_a_real_one_sends(runs):
    for alone, real in zip(*runs, strict=True):
        assert (alone.lanes, alone.form) == (real.lanes, real.form)
        for found, expected in ((alone.prefill, real.prefill), (alone.decode, real.decode)):
            assert [message.ranks for message in found] == [message.ranks for message in expected]
            if alone.form != "exchange":  # its bytes depend on the routing
                assert [message.bytes for message in found] == [m.bytes for m in expected]


def test_cases_are_the_forms_that_lanes_can_use(runs):
    assert [(run.lanes, run.form) for run in runs[0]] == [
        (1, "shared_batch"),
        (2, "decode"),
        (2, "exchange"),
    ]


def test_a_rank_without_peers_can_belong_to_any_grid(folder):
    work = Work(folder, "float32", Grid(4, 16), [2], 1, 3, repeats=1, seed=0)

    run, _ = run_alone(64, run_forms, work, threads=1)

    # The lanes share the tokens; the sums go to all ranks.
    assert {len(message.ranks) for message in run.decode} >= {2, 64}


def test_a_prediction_is_computation_and_collectives():
    link = Link("x", base=1e-3, per_peer=1e-3, bandwidth=1e6, origin="test")
    message = Message("all_to_all", (0, 1, 2, 3), 1000)  # 4 ms and 1 ms
    run = Run(2, "decode", [[0.1, 0.13, 0.155]], prefill=2 * [message], decode=4 * [message])

    row = predicted(2, Grid(2, 2), run, {"x": Network(link, link, 8)})

    assert row["grid"] == "2x2"
    assert row["prefill"]["model_ms"]["x"] == pytest.approx(100 + 2 * 5)
    assert row["decode"]["compute_ms"] == pytest.approx(25)
    assert row["decode"]["model_ms"]["x"] == pytest.approx(25 + 4 * 5)
    assert row["decode"]["collectives"] == 2
    assert row["decode"]["sent_bytes"] == 2000


def test_steps_are_those_of_all_repeats():
    moments = [[1.0, 1.5], [2.0, 2.7], [4.0, 4.1]]

    assert step_seconds(moments, statistics.median) == pytest.approx((2.0, 0.5))
    assert step_seconds(moments, min) == pytest.approx((1.0, 0.1))


def test_ranks_that_share_a_core_compute_for_longer():
    run = Run(1, "shared_batch", [[0.1, 0.13]], prefill=[], decode=[])
    link = Link("x", base=0, per_peer=0, bandwidth=1, origin="test")

    row = predicted(1, Grid(2, 2), run, {"x": Network(link, link, 8)}, sharing=2)

    assert row["decode"]["model_ms"]["x"] == pytest.approx(60)


def test_a_report_says_that_it_is_a_model_and_compares_it(tmp_path, capsys):
    results = results_of(
        scaling,
        *(tmp_path, "--work", tmp_path / "w", *TINY, "--repeats", 1, "--lanes", 1, 2),
        *("--grids", "4x2", "--check", "2x1", "--links", "nvlink", "measured"),
    )

    assert [(row["lanes"], row["form"]) for row in results["model"]] == [
        (1, "shared_batch"),
        (2, "decode"),
        (2, "exchange"),
    ]
    for row in results["check"]:
        assert row["grid"] == "2x1"
        decode = row["decode"]
        assert decode["ratio"] == pytest.approx(decode["model_ms"] / decode["measured_ms"])
    header = capsys.readouterr().out.splitlines()[0]
    assert "nvlink TPOT ms (model)" in header and "measured TPOT ms (model)" in header


@pytest.mark.parametrize("text", ["1x1", "0x2", "x", "2xtwo"])
def test_a_grid_of_fewer_than_two_ranks_is_refused(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        parse_grid(text)
