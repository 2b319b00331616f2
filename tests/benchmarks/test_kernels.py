"""The benchmark of one layer: all ways compute the same, and its figures are consistent."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from benchmarks import harness, kernels
from benchmarks.timing import Clock
from benchmarks.ways import DENSE, MODES
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.testing.random_layer import LayerShape, RandomLayer
from tests.benchmarks.runs import SMALL, results_of
from tests.checkpoints.damage import mistake

SHAPE, EXPERT_BYTES = "64x48x4x2", 48 * 192 * 2
TWO_SHAPES = ("--shapes", SHAPE, "32x24x6x3", "--tokens", 1, 100, "--repeats", 3)


@pytest.mark.parametrize("codec", ["pruned", "low_rank", "quantized"])
def test_every_figure_follows_from_seconds_and_bytes(tmp_path, codec):
    results = results_of(kernels, tmp_path, *TWO_SHAPES, "--codec", codec)

    assert [(row["shape"], row["tokens"]) for row in results["rows"]] == [
        (shape, tokens) for shape in (SHAPE, "32x24x6x3") for tokens in (1, 100)
    ]
    assert results["skipped"] == []
    (memory,) = results["memory"]
    for row, expert_bytes in zip(results["rows"], [18432] * 2 + [4608] * 2, strict=True):
        seconds = {name: found["median"] for name, found in row["seconds"].items()}
        assert set(seconds) == {*DENSE, *MODES}
        assert all(len(found["all"]) == 3 for found in row["seconds"].values())
        assert row["fastest_dense"] == min(DENSE, key=seconds.get)
        assert row["bytes"]["dense"] == row["active_experts"] * expert_bytes
        assert row["bound"] == row["bytes"]["dense"] / row["bytes"]["compressed"]
        assert row["auto_takes"] in MODES and row["auto_takes"] != "auto"
        assert set(row["ratios"]) == set(row["of_bound"]) == set(MODES)
        for name in MODES:
            ratio = min(seconds[way] for way in DENSE) / seconds[name]
            assert row["ratios"][name] == pytest.approx(ratio)
            assert row["of_bound"][name] == pytest.approx(ratio / row["bound"])
        for name, rate in row["bytes_per_second"].items():
            size = row["bytes"]["dense" if name in DENSE else "compressed"]
            assert rate == pytest.approx(size / seconds[name])
            assert row["of_memory"][name] == pytest.approx(rate / memory["read"])
        figures = [*row["ratios"].values(), *row["of_memory"].values(), row["bound"]]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        assert all(error < 0.03 for error in row["relative_errors"].values())
    assert [row["active_experts"] for row in results["rows"]] == [2, 4, 3, 6]


def test_restoring_and_resident_bytes(tmp_path):
    options = ("--shapes", SHAPE, "--tokens", 1, "--repeats", 1)
    results = results_of(kernels, tmp_path, *options, restored_bytes=3 * EXPERT_BYTES)

    (found,) = results["resident"]
    stored = EXPERT_BYTES + 4 * (48 * 192 // 8 + 2 * 48 * 192 // 4 + 4 * 49)
    assert (found["dense"], found["stored"]) == (4 * EXPERT_BYTES, stored)
    assert found["resident"] == pytest.approx(stored, rel=0.02)
    assert found["of_stored"] == found["resident"] / stored
    # A block is a whole expert, in the mode that restores.
    assert found["workspace"]["restore"] == EXPERT_BYTES
    assert found["workspace"]["shared"] == found["workspace"]["tiled"] == 0
    assert [row["experts"] for row in results["restoring"]] == [1, 3]
    for row in results["restoring"]:
        n = row["experts"]
        assert row["bytes"]["copy"] == 2 * n * EXPERT_BYTES
        read = EXPERT_BYTES + n * (stored - EXPERT_BYTES) / 4
        assert row["bytes"]["restore"] == pytest.approx(read + n * EXPERT_BYTES, rel=0.02)
        rates = {name: row["bytes"][name] / row["seconds"][name]["median"] for name in row["bytes"]}
        assert row["ratio"] == pytest.approx(rates["restore"] / rates["copy"])


def test_only_the_modes_asked_for_are_run(tmp_path):
    options = ("--shapes", SHAPE, "--tokens", 2, "--modes", "shared", "--repeats", 1)
    (row,) = results_of(kernels, tmp_path, *options)["rows"]
    assert set(row["seconds"]) == {*DENSE, "shared"}
    assert row["auto_takes"] is None


def test_dense_ways_that_cannot_run_are_listed_with_the_reason(tmp_path, capsys):
    # Rows of 22 bytes, which PyTorch's grouped product refuses.
    options = ("--shapes", "20x11x4x2", "--tokens", 3, 4, "--repeats", 1)
    results = results_of(kernels, tmp_path, *options, gathered_bytes=6 * 3 * 11 * 20 * 2)
    skipped = {(row["tokens"], row["way"]): row["reason"] for row in results["skipped"]}
    assert set(skipped) == {(3, "grouped_mm"), (4, "grouped_mm"), (4, "batched_mm")}
    assert "would copy" in skipped[4, "batched_mm"]
    assert results["rows"][1]["fastest_dense"] == "eager"
    assert "would copy" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["dense", "compressed"])
def test_way_that_computes_something_else_is_not_timed(damaged):
    shape, spec = LayerShape("tiny", 64, 48, 4, 2), CodecSpec.parse("pruned:keep=0.25")
    layer, clock = RandomLayer(shape, spec, torch.device("cpu")), Clock(effort=SMALL)
    ways = {"eager": layer.dense("eager"), "shared": layer.compressed("shared")}
    inputs = layer.tokens(20)
    errors, skipped = kernels.check_outputs(clock, layer, ways, inputs)
    assert set(errors) == set(ways) and not skipped
    assert all(0 < error < 0.02 for error in errors.values())
    if damaged == "compressed":
        layer.weights.residuals[2].values[:50] += 0.1
    else:
        ways["eager"].gate_up_proj = torch.nn.Parameter(layer.gate_up.flip(1), requires_grad=False)
    wrong = "shared" if damaged == "compressed" else "eager"
    with pytest.raises(RuntimeError, match=f"20 tokens: the output of {wrong} differs"):
        kernels.check_outputs(clock, layer, ways, inputs)


def test_plot_has_a_diagram_for_each_shape(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.svg"
    results_of(kernels, tmp_path, *TWO_SHAPES, "--plot", path)
    assert path.read_text().count('id="axes_') == 2


def test_plot_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    with mistake("must end in"):
        harness.run(kernels, ["--plot", str(tmp_path / "ratios.txt")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with mistake("needs matplotlib"):
        harness.run(kernels, ["--plot", str(tmp_path / "ratios.svg")])


@pytest.mark.parametrize("option", [("--keep", "0"), ("--tokens", "0"), ("--shapes", "8x4x3")])
def test_wrong_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        harness.run(kernels, option)
    assert option[1] in capsys.readouterr().err
