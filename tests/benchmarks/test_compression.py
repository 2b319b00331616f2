"""Every benchmark of compression at a tiny size: it runs, and its figures are consistent."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from benchmarks import harness
from benchmarks.compression import BENCHMARKS
from benchmarks.compression.alignment import random_experts
from benchmarks.compression.models import WAYS, calibration_text
from benchmarks.processes import tools_path
from resmoe_dist.compression.alignment import align
from resmoe_dist.testing.corpus import BOS_ID, EOS_ID, byte_tokenizer, read_corpus
from resmoe_dist.testing.recipes import RECIPES, build_model
from resmoe_dist.testing.synthetic_model import SyntheticModel
from resmoe_dist.testing.training import HELD_OUT_FILE
from tests.benchmarks.runs import TINY_EXPERT_BYTES, TINY_MODEL, results_of
from tests.checkpoints.damage import mistake
from tests.models import compress


def test_alignment_compares_both_methods_on_the_same_experts(tmp_path):
    sizes = ("--rows", 30, "--columns", 60, "--experts", 3)
    rows = results_of(BENCHMARKS, tmp_path, "alignment", *sizes, "--repeats", 2)["rows"]

    assert [row["kind"] for row in rows] == ["related", "unrelated"]
    for row in rows:
        seconds, objectives = row["seconds"], row["objectives"]
        assert len(seconds["loo"]["all"]) == len(seconds["pot"]["all"]) == 2
        assert row["time_ratio"] == seconds["loo"]["median"] / seconds["pot"]["median"]
        assert row["objective_ratio"] == objectives["loo"] / objectives["pot"]
        for whole, inside in zip(seconds["pot"]["all"], seconds["barycenter"]["all"], strict=True):
            assert 0 < inside < whole
        experts_EID = random_experts(row["kind"], 3, 30, 60, seed=0)
        for method, objective in objectives.items():
            aligned_EID = align(experts_EID, method).apply(experts_EID).double()
            expected = float((aligned_EID - aligned_EID.mean(0)).square().sum()) / 3
            assert objective == pytest.approx(expected, rel=1e-6)
    # Alignment leaves the noise of related experts: a variance of 0.25, less the mean's.
    found = rows[0]["objectives"]["loo"]
    assert found == pytest.approx(0.25 * 2 / 3 * 30 * 60, rel=0.1)


def _smallest_squares(values, count):
    """Sum of the `count` smallest squares."""
    return float(values.flatten().double().square().sort().values[:count].sum())


def test_center_compares_errors_at_the_same_number_of_values(tmp_path):
    sizes = ("--experts", 2, 4, "--keeps", 0.25, "--rows", 40, "--columns", 50)
    rows = results_of(BENCHMARKS, tmp_path, "center", *sizes, "--repeats", 1)["rows"]

    for row, count in zip(rows, (2, 4), strict=True):
        errors = row["relative_errors"]
        assert row["change"] == pytest.approx(errors["joint"] / errors["barycenter"] - 1)
        assert row["change_to_paper"] == pytest.approx(errors["joint"] / errors["paper"] - 1)
        assert row["kept"]["joint"] == row["kept"]["barycenter"] == count * 500
        generator = torch.Generator().manual_seed(0)
        experts_EID = torch.empty(count, 40, 50).normal_(generator=generator)
        residual_EID = experts_EID - experts_EID.mean(0)
        norm = float(experts_EID.double().square().sum())
        per_group = _smallest_squares(residual_EID, count * 1500) / norm
        per_expert = sum(_smallest_squares(r_ID, 1500) for r_ID in residual_EID) / norm
        assert errors["barycenter"] == pytest.approx(per_group, rel=1e-4)
        assert errors["paper"] == pytest.approx(per_expert, rel=1e-4)


@pytest.mark.parametrize("options", ["--ep 2", "--ep 2 --center barycenter --align pot"])
def test_layer_accounts_for_all_its_seconds_and_bytes(tmp_path, options):
    source = ("--source", tmp_path / "source")
    arguments = ("layer", *TINY_MODEL, *source, "--cold", "--repeats", 2, "--options", options)
    results = results_of(BENCHMARKS, tmp_path, *arguments)

    seconds = {row["stage"]: row["seconds"]["all"] for row in results["rows"]}
    totals = seconds.pop("total")
    for repeat, total in enumerate(totals):
        assert sum(each[repeat] for each in seconds.values()) == pytest.approx(total)
    stages = {"read", "align", "center", "threshold", "encode", "write", "digest", "rest"}
    assert set(seconds) == stages | ({"barycenter"} if "pot" in options else set())
    assert all(min(each) > 0 for each in seconds.values())
    for row in results["rows"]:
        share = row["seconds"]["median"] / results["rows"][-1]["seconds"]["median"]
        assert row["share"] == share
    (layer,) = results["layer"]
    assert layer["groups"] == 2
    assert layer["source_bytes"] == 4 * TINY_EXPERT_BYTES
    peaks = layer["memory"]["one"]
    assert peaks["high_water"] >= peaks["anonymous"] > 0


@pytest.mark.slow
def test_layer_stages_cover_most_of_a_real_task(tmp_path):
    sizes = ("--rows", 1024, "--hidden", 512, "--experts", 4)
    results = results_of(BENCHMARKS, tmp_path, "layer", *sizes)
    rest = next(row for row in results["rows"] if row["stage"] == "rest")
    assert rest["share"] < 0.3


@pytest.mark.slow
def test_large_model_survives_a_kill(tmp_path):
    source = tmp_path / "work" / "source"
    SyntheticModel(layers=6, hidden=32, rows=40, experts=4).write(source)
    compress(source, tmp_path / "whole", center="auto")

    arguments = ("--layers", 6, *TINY_MODEL, "--work", tmp_path / "work", "--max-memory", "2GB")
    more = ("--kill-after", 0.1, "--against", tmp_path / "whole")
    results = results_of(BENCHMARKS, tmp_path, "large", *arguments, *more)

    killed, resumed = results["rows"]
    (result,) = results["result"]
    assert killed["killed"] and not resumed["killed"]
    assert result["differing_files"] == result["made_again"] == []
    for row in results["rows"]:
        assert row["largest_anonymous"] == row["memory"]["one"]["anonymous"]
        assert row["within_bound"] == (row["largest_anonymous"] <= result["max_memory"])
    assert result["source_bytes"] == 6 * 4 * TINY_EXPERT_BYTES


def test_large_checks_the_folder_to_compare_with_before_it_starts(tmp_path):
    work = tmp_path / "work"
    arguments = ["large", "--layers", "1", *map(str, TINY_MODEL), "--work", str(work)]
    with mistake("no such folder"):
        harness.run(BENCHMARKS, [*arguments, "--against", str(tmp_path / "none")])
    (work / "compressed").mkdir(parents=True)
    with mistake("this run replaces it"):
        harness.run(BENCHMARKS, [*arguments, "--against", str(work / "compressed")])


@pytest.mark.slow
def test_spread_over_ranks_writes_the_same_files(tmp_path):
    if shutil.which("mpirun", path=tools_path()) is None:
        pytest.skip("mpirun is not installed")
    ranks = ("--ranks", 2, "--threads", 2, "--repeats", 1)
    results = results_of(BENCHMARKS, tmp_path, "spread", "--layers", 2, *TINY_MODEL, *ranks)

    one, two = results["rows"]
    (comparison,) = results["comparison"]
    assert (one["ranks"], one["threads"], two["ranks"], two["threads"]) == (1, 2, 2, 1)
    assert comparison["speedup"] == one["seconds"]["median"] / two["seconds"]["median"]
    assert comparison["differing_files"] == []
    assert one["runs"][0]["memory"]["processes"] < two["runs"][0]["memory"]["processes"]


def test_spread_needs_as_many_threads_for_every_rank():
    with mistake("divide 3 threads"):
        harness.run(BENCHMARKS, ["spread", "--ranks", "2", "--threads", "3"])


def _save_untrained_model(folder):
    """What `resmoe-dist tiny-model` writes, but smaller and untrained."""
    small = {"hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 2}
    build_model("mixtral", RECIPES["mixtral"].config | small).save_pretrained(folder)
    byte_tokenizer("left").save_pretrained(folder)
    sequences = [[BOS_ID, *range(start, start + 60)] for start in range(4)]
    (folder / HELD_OUT_FILE).write_text(json.dumps(sequences))


def test_models_are_compared_at_the_same_keep(tmp_path):
    _save_untrained_model(tmp_path / "mixtral")
    choice = ("--families", "mixtral", "--keeps", 0.25, "--ep", 2, "--sequences", 3)
    results = results_of(BENCHMARKS, tmp_path, "models", *choice, "--work", tmp_path)

    assert [row["way"] for row in results["rows"]] == list(WAYS)
    (original,) = results["originals"]
    assert original["tokens"] == 3 * 60
    paper = results["rows"][0]
    assert paper["way"] == "paper" and paper["worse"] == []
    for row in results["rows"]:
        # One centre for two experts; a quarter of the entries, and one bit for each.
        assert row["dense_share"] == pytest.approx(1 / 4 + 1 / 4 + 1 / 32, rel=0.03)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert ("perplexity" in row["worse"]) == (row["perplexity"] > paper["perplexity"])
        assert ("relative_error" in row["worse"]) == (
            row["relative_error"] > paper["relative_error"]
        )
        assert (row["weighted_relative_error"] is not None) == row["way"].startswith("calibrated")
    assert results["rows"][1]["relative_error"] < paper["relative_error"]


def test_calibration_text_is_of_the_training_files():
    text = calibration_text().encode()
    train, held_out = (
        tokens[tokens != EOS_ID].to(torch.uint8).numpy().tobytes() for tokens in read_corpus()
    )
    assert len(text) > 60_000
    pieces = [text[start : start + 200] for start in range(0, len(text), 5000)]
    # Some pieces are across two places, or had bytes that were not text.
    assert sum(piece in train for piece in pieces) >= 0.7 * len(pieces)
    assert sum(piece in held_out for piece in pieces) <= 1
