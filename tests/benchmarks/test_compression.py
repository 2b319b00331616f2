"""Every benchmark of compression on tiny sizes: it runs, and its figures are what they say."""

from __future__ import annotations

import json
import math
import shutil
import time

import pytest
import torch

from benchmarks.alignment import random_experts
from benchmarks.compression import run
from benchmarks.machine import summary
from benchmarks.one_layer import StageClock
from benchmarks.process import tools_path
from benchmarks.synthetic import SyntheticModel
from benchmarks.tiny_models import WAYS, calibration_text
from resmoe_dist.compression.alignment import align
from resmoe_dist.testing.corpus import BOS_ID, EOS_ID, byte_tokenizer, read_corpus
from resmoe_dist.testing.recipes import RECIPES, build_model
from resmoe_dist.testing.training import HELD_OUT_FILE
from tests.checkpoints.damage import mistake
from tests.models import compress

SHAPE = ["--rows", "40", "--hidden", "32", "--experts", "4"]


def _run(tmp_path, *arguments):
    """Results of a benchmark, as `--json` wrote them."""
    path = tmp_path / "results.json"
    report = run([*map(str, arguments), "--json", str(path)])
    assert json.loads(path.read_text()) == report
    assert report["machine"]["threads"] == torch.get_num_threads()
    return report["results"]


def _lowest_squares(values, count):
    """Sum of the `count` smallest squares."""
    return float(values.flatten().double().square().sort().values[:count].sum())


def test_alignment_compares_both_on_the_same_experts(tmp_path, capsys):
    results = _run(
        tmp_path,
        *("alignment", "--rows", 30, "--columns", 60, "--experts", 3, "--repeats", 2),
    )

    assert [row["kind"] for row in results["rows"]] == ["related", "unrelated"]
    for row in results["rows"]:
        seconds, objectives = row["seconds"], row["objectives"]
        assert len(seconds["loo"]["all"]) == len(seconds["pot"]["all"]) == 2
        assert row["time_ratio"] == seconds["loo"]["median"] / seconds["pot"]["median"]
        assert row["objective_ratio"] == objectives["loo"] / objectives["pot"]
        for whole, inside in zip(seconds["pot"]["all"], seconds["barycenter"]["all"], strict=True):
            assert 0 < inside < whole
        experts_NID = random_experts(row["kind"], 3, 30, 60, seed=0)
        for method, objective in objectives.items():
            aligned_NID = align(experts_NID, method).apply(experts_NID).double()
            expected = float((aligned_NID - aligned_NID.mean(0)).square().sum()) / 3
            assert objective == pytest.approx(expected, rel=1e-6)
    # Of related experts all that is left is their noise: a variance of 0.25, less the mean's.
    found = results["rows"][0]["objectives"]["loo"]
    assert found == pytest.approx(0.25 * 2 / 3 * 30 * 60, rel=0.1)
    assert "objective loo" in capsys.readouterr().out


def test_center_compares_errors_at_the_same_number_of_values(tmp_path, capsys):
    results = _run(
        tmp_path,
        *("center", "--experts", 2, 4, "--keeps", 0.25, "--rows", 40, "--columns", 50),
        *("--repeats", 1),
    )

    for row, count in zip(results["rows"], (2, 4), strict=True):
        errors = row["relative_errors"]
        assert row["change"] == pytest.approx(errors["joint"] / errors["barycenter"] - 1)
        assert row["change_to_paper"] == pytest.approx(errors["joint"] / errors["paper"] - 1)
        assert row["kept"]["joint"] == row["kept"]["barycenter"] == count * 500
        generator = torch.Generator().manual_seed(0)
        experts_NID = torch.empty(count, 40, 50).normal_(generator=generator)
        away_NID = experts_NID - experts_NID.mean(0)
        norm = float(experts_NID.double().square().sum())
        in_group = _lowest_squares(away_NID, count * 1500) / norm
        each = sum(_lowest_squares(away_ID, 1500) for away_ID in away_NID) / norm
        assert errors["barycenter"] == pytest.approx(in_group, rel=1e-4)
        assert errors["paper"] == pytest.approx(each, rel=1e-4)
    assert "-" in capsys.readouterr().out


def test_time_of_an_inner_stage_is_not_the_outer_ones(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 7.0])  # encode begins, centre begins, ends, encode ends
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = StageClock()
    with clock.stage("encode"):
        assert clock.timing("centre", max)(1, 2) == 2
    assert clock.seconds["centre"] == 2.0
    assert clock.seconds["encode"] == 5.0
    assert sum(clock.seconds.values()) == 7.0


@pytest.mark.parametrize("options", [[], ["--center", "barycenter", "--align", "pot", "--cold"]])
def test_layer_accounts_for_all_its_seconds_and_bytes(tmp_path, options):
    source = tmp_path / "source"
    SyntheticModel(layers=1, hidden=32, rows=40, experts=4).write(source)

    results = _run(tmp_path, "layer", *SHAPE, "--groups", 2, "--source", source, *options)

    seconds = results["seconds"]
    assert sum(seconds.values()) == pytest.approx(results["total_seconds"], rel=0.05)
    assert all(seconds[stage] > 0 for stage in ("read", "align", "centre", "encode", "write"))
    assert results["source_bytes"] == 4 * 40 * 96 * 2
    assert len(results["records"]) == 2
    assert results["memory"]["one"]["anonymous"] > 0
    assert results["memory"]["one"]["high_water"] >= results["memory"]["one"]["anonymous"]
    own = [entry["own_seconds"] for entry in results["profile"]]
    assert own == sorted(own, reverse=True)
    assert sum(own) <= results["total_seconds"]


@pytest.mark.slow
def test_large_model_survives_a_kill(tmp_path, capsys):
    source = tmp_path / "work" / "source"
    SyntheticModel(layers=6, hidden=32, rows=40, experts=4).write(source)
    compress(source, tmp_path / "whole", center="auto")

    results = _run(
        tmp_path,
        *("large", "--layers", 6, *SHAPE, "--work", tmp_path / "work", "--max-memory", "2GB"),
        *("--kill-after", 0.1, "--against", tmp_path / "whole"),
    )

    killed, resumed = results["runs"]
    assert killed["killed"] and not resumed["killed"]
    assert results["differing_files"] == results["made_again"] == []
    for row in results["runs"]:
        memory = row["memory"]["one"]
        assert row["largest_anonymous"] == memory["anonymous"]
        assert row["within_bound"] == (memory["anonymous"] <= results["max_memory"])
        assert memory["unique"] > 0
    assert results["experts"]["source_bytes"] == 6 * 4 * 40 * 96 * 2
    assert "all files equal" in capsys.readouterr().out


def test_large_wants_its_folder_to_compare_with_before_it_starts(tmp_path):
    arguments = ["--layers", "1", *SHAPE, "--work", str(tmp_path / "w")]
    with mistake("no such folder"):
        run(["large", *arguments, "--against", str(tmp_path / "none")])
    (tmp_path / "w" / "compressed").mkdir(parents=True)
    with mistake("made anew"):
        run(["large", *arguments, "--against", str(tmp_path / "w" / "compressed")])


@pytest.mark.slow
def test_spread_over_ranks_writes_the_same_files(tmp_path):
    if shutil.which("mpirun", path=tools_path()) is None:
        pytest.skip("mpirun is not installed")
    results = _run(
        tmp_path,
        *("spread", "--layers", 2, *SHAPE, "--ranks", 2, "--threads", 2, "--repeats", 1),
    )

    one, two = results["rows"]
    assert (one["ranks"], one["threads"], two["ranks"], two["threads"]) == (1, 2, 2, 1)
    assert results["speedup"] == one["seconds"]["median"] / two["seconds"]["median"]
    assert results["differing_files"] == []
    assert one["runs"][0]["memory"]["processes"] < two["runs"][0]["memory"]["processes"]


def test_spread_wants_as_many_threads_for_every_rank(tmp_path):
    with mistake("divide 3 threads"):
        run(["spread", "--ranks", "2", "--threads", "3"])


def _save_untrained_model(folder):
    """What `resmoe-dist tiny-model` leaves behind, smaller and untrained."""
    small = {"hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 2}
    build_model("mixtral", RECIPES["mixtral"].config | small).save_pretrained(folder)
    byte_tokenizer("left").save_pretrained(folder)
    sequences = [[BOS_ID, *range(start, start + 60)] for start in range(4)]
    (folder / HELD_OUT_FILE).write_text(json.dumps(sequences))


def test_models_are_compared_at_the_same_keep(tmp_path, capsys):
    _save_untrained_model(tmp_path / "mixtral")

    results = _run(
        tmp_path,
        *("models", "--families", "mixtral", "--keeps", 0.25, "--ep", 2, "--sequences", 3),
        *("--work", tmp_path),
    )

    assert [row["way"] for row in results["rows"]] == list(WAYS)
    paper = results["rows"][0]
    (original,) = results["originals"]
    assert original["tokens"] == 3 * 60
    for row in results["rows"]:
        # A centre for four experts; a quarter of the entries, and one bit for each.
        expected = 1 / 4 + 1 / 4 + 1 / 32
        assert row["dense_share"] == pytest.approx(expected, rel=0.03)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["worse_relative_error"] == (row["relative_error"] > paper["relative_error"])
        assert row["worse_perplexity"] == (row["perplexity"] > paper["perplexity"])
        assert (row["weighted_relative_error"] is not None) == row["way"].startswith("calibrated")
    default = results["rows"][1]
    worse = default["worse_relative_error"] or default["worse_perplexity"]
    assert results["default_worse"] == ([default] if worse else [])
    assert "worse than paper" in capsys.readouterr().out


def test_calibration_text_is_of_the_training_files():
    text = calibration_text().encode()
    train, held_out = (
        tokens[tokens != EOS_ID].to(torch.uint8).numpy().tobytes() for tokens in read_corpus()
    )
    assert len(text) > 60_000
    pieces = [text[start : start + 200] for start in range(0, len(text), 5000)]
    found = [piece in train for piece in pieces]
    # A piece may lie across two places, or where bytes were no text.
    assert sum(found) >= 0.7 * len(found)
    assert sum(piece in held_out for piece in pieces) <= 1


def test_summary_has_the_median_and_the_spread():
    assert summary([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "least": 1.0,
        "most": 3.0,
        "all": [3.0, 1.0, 2.0],
    }
