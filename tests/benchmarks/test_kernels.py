"""The benchmark of one layer: its ways compute the same, and its figures are what they say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks import kernels, random_layer, speed
from benchmarks.kernels import DENSE, MODES
from benchmarks.random_layer import SHAPES, LayerShape, RandomLayer, layer_shape
from resmoe_dist.codecs.bitmap import unpack_bitmap
from resmoe_dist.design_matrix import to_rows
from tests.checkpoints.damage import mistake

CPU = torch.device("cpu")
SHAPE = LayerShape("tiny", hidden=64, rows=48, experts=4, top_k=2)
SMALL = ["--shapes", "64x48x4x2", "32x24x6x3", "--tokens", "1", "100", "--repeats", "3"]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """Nothing here is about the memory's true speed."""
    monkeypatch.setattr(speed, "_STREAMED_BYTES", 1 << 16)
    monkeypatch.setattr(speed, "_EVICTING_BYTES", 1 << 16)


@pytest.fixture(params=["pruned", "low_rank"])
def layer(request, monkeypatch):
    """A layer drawn in several blocks of rows, the last one shorter."""
    monkeypatch.setattr(random_layer, "_BLOCK_ENTRIES", 3 * 64 * 20)
    return RandomLayer(SHAPE, request.param, 0.25, CPU, seed=0)


def _run(tmp_path, *arguments):
    """Results of the benchmark, as `--json` wrote them."""
    path = tmp_path / "results.json"
    report = speed.run(kernels, [*map(str, arguments), "--json", str(path)])
    assert json.loads(path.read_text()) == report
    return report["results"]


def _dense_rows(layer, expert):
    """The design matrix [I, D] that the dense weights hold."""
    gate, up = layer.gate_up[expert].chunk(2)
    return to_rows(SHAPE.expert, {"gate": gate, "up": up, "down": layer.down[expert]})


def test_dense_weights_are_centre_and_residual_rounded(layer):
    center = layer.group.center.float()
    for expert, residual in enumerate(layer.group.residuals):
        tensors = {name: tensor.float() for name, tensor in residual.tensors().items()}
        if "bitmap" in tensors:
            decoded = residual.decode().float()
        else:
            decoded = tensors["left"] @ tensors["right"]
        expected = center + decoded
        # One rounding to 8 bits; a product in another order may fall to its other side.
        away = (_dense_rows(layer, expert).float() - expected).abs()
        assert bool((away <= expected.abs() * 2**-8 + 1e-6).all())
        assert float(decoded.square().mean()) > 1e-5
    assert (
        len(
            {
                residual.get_buffer(name).data_ptr()
                for residual in layer.group.residuals
                for name in residual.tensors()
            }
        )
        == len(tensors) * SHAPE.experts
    )


def test_masks_are_random_and_each_experts_own():
    layer = RandomLayer(SHAPE, "pruned", 0.25, CPU, seed=0)
    masks = [unpack_bitmap(residual.bitmap, 3 * 64) for residual in layer.group.residuals]
    for mask, residual in zip(masks, layer.group.residuals, strict=True):
        assert float(mask.float().mean()) == pytest.approx(0.25, abs=0.02)
        assert residual.row_offsets.diff().tolist() == mask.sum(1).tolist()
        assert len(residual.values) == int(mask.sum())
    both = (masks[0] & masks[1]).float().mean()
    assert float(both) == pytest.approx(0.25**2, abs=0.01)


def test_weights_are_the_seeds():
    first, again, other = (RandomLayer(SHAPE, "pruned", 0.5, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.gate_up, again.gate_up)
    assert torch.equal(first.tokens(3)[0], again.tokens(3)[0])
    assert not torch.equal(first.gate_up, other.gate_up)


def test_routing_is_uniform_and_drawn_anew(layer):
    x_TH, index_TK, weights_TK = layer.tokens(3000)
    assert (x_TH.shape, x_TH.dtype) == ((3000, 64), torch.bfloat16)
    assert bool((index_TK[:, 0] != index_TK[:, 1]).all())
    counts = index_TK.flatten().bincount(minlength=4)
    assert counts.tolist() == pytest.approx([1500] * 4, rel=0.1)
    assert torch.allclose(weights_TK.sum(1), torch.ones(3000))
    assert bool((weights_TK > 0).all())
    again = layer.tokens(3000)
    assert not any(
        torch.equal(a, b) for a, b in zip((x_TH, index_TK, weights_TK), again, strict=True)
    )


def test_bytes_are_those_of_what_the_tokens_touch():
    layer = RandomLayer(SHAPE, "pruned", 0.25, CPU, seed=0)
    dense, compressed = layer.bytes_read(torch.tensor([[0, 2], [2, 0], [2, 0]]))
    assert dense == 2 * 3 * 48 * 64 * 2
    kept = sum(int(unpack_bitmap(layer.group.residuals[k].bitmap, 192).sum()) for k in (0, 2))
    center, bitmaps, offsets = 48 * 192 * 2, 2 * 48 * 192 // 8, 2 * 49 * 4
    assert compressed == center + bitmaps + offsets + 2 * kept


def test_bytes_of_a_low_rank_layer_are_its_factors():
    layer = RandomLayer(SHAPE, "low_rank", 0.25, CPU, seed=0)
    rank = int(0.25 * 48 * 192 / (48 + 192))
    _, compressed = layer.bytes_read(torch.tensor([[3, 1]]))
    assert compressed == 48 * 192 * 2 + 2 * rank * (48 + 192) * 2


def test_exact_output_is_the_weighted_sum_of_expert_mlps(layer):
    x_TH, index_TK, weights_TK = layer.tokens(7)
    found = layer.exact(x_TH, index_TK, weights_TK)
    for t in range(7):
        x = x_TH[t].double()
        expected = torch.zeros(64, dtype=torch.float64)
        for k, weight in zip(index_TK[t].tolist(), weights_TK[t].tolist(), strict=True):
            rows = _dense_rows(layer, k).double()
            h = F.silu(rows[:, :64] @ x) * (rows[:, 64:128] @ x)
            expected += weight * (h @ rows[:, 128:])
        assert torch.allclose(found[t].double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("damaged", ["dense", "compressed"])
def test_way_that_computes_something_else_is_not_timed(damaged):
    layer = RandomLayer(SHAPE, "pruned", 0.25, CPU, seed=0)
    ways = {"eager": layer.dense("eager"), "shared": layer.compressed("shared")}
    inputs = layer.tokens(20)
    errors, skipped = kernels._checked(layer, ways, inputs)
    assert set(errors) == set(ways) and not skipped
    assert all(0 < error < 0.02 for error in errors.values())
    if damaged == "compressed":
        layer.group.residuals[2].values[:50] += 0.1
    else:
        ways["eager"].gate_up_proj = torch.nn.Parameter(layer.gate_up.flip(1), requires_grad=False)
    wrong = "shared" if damaged == "compressed" else "eager"
    with pytest.raises(RuntimeError, match=f"20 tokens: {wrong} is .* away"):
        kernels._checked(layer, ways, inputs)


@pytest.mark.parametrize("codec", ["pruned", "low_rank"])
def test_every_figure_follows_from_seconds_and_bytes(tmp_path, capsys, codec):
    results = _run(tmp_path, *SMALL, "--codec", codec)

    assert [(row["shape"], row["tokens"]) for row in results["rows"]] == [
        (shape, tokens) for shape in ("64x48x4x2", "32x24x6x3") for tokens in (1, 100)
    ]
    for row, expert_bytes in zip(results["rows"], [18432] * 2 + [4608] * 2, strict=True):
        seconds = {name: found["median"] for name, found in row["seconds"].items()}
        assert set(seconds) == {*DENSE, *MODES} and not row["skipped"]
        assert all(len(row["seconds"][name]["all"]) == 3 for name in MODES)
        assert row["fastest_dense"] == min(DENSE, key=seconds.get)
        assert row["bytes"]["dense"] == row["active_experts"] * expert_bytes
        assert row["bound"] == row["bytes"]["dense"] / row["bytes"]["compressed"]
        assert sum(row["choices"].values()) == 3 and set(row["choices"]) <= set(MODES) - {"auto"}
        assert set(row["ratios"]) == set(row["of_bound"]) == set(MODES)
        for name in MODES:
            ratio = min(seconds[way] for way in DENSE) / seconds[name]
            assert row["ratios"][name] == pytest.approx(ratio)
            assert row["of_bound"][name] == pytest.approx(ratio / row["bound"])
        for name, rate in row["bytes_per_second"].items():
            size = row["bytes"]["dense" if name in DENSE else "compressed"]
            assert rate == pytest.approx(size / seconds[name])
            assert row["of_memory"][name] == pytest.approx(rate / results["memory"]["read"])
        figures = [*row["ratios"].values(), *row["of_memory"].values(), row["bound"]]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        assert all(error < 0.03 for error in row["relative_errors"].values())
    assert [row["active_experts"] for row in results["rows"]] == [2, 4, 3, 6]
    text = capsys.readouterr().out
    for row in results["rows"]:
        assert f"{row['bound']:.2f}" in text
        assert f"{row['ratios']['restore']:.2f} ({row['of_bound']['restore']:.0%})" in text


def test_restoring_and_resident_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_RESTORED_BYTES", 3 * 18432)
    results = _run(tmp_path, "--shapes", "64x48x4x2", "--tokens", 1, "--repeats", 1)

    (found,) = results["resident"]
    center, dense = 48 * 192 * 2, 4 * 48 * 192 * 2
    kept = 48 * 192 // 4
    stored = center + 4 * (48 * 192 // 8 + 2 * kept + 4 * 49)
    assert (found["dense"], found["stored"]) == (dense, stored)
    assert found["resident"] == pytest.approx(stored, rel=0.02)
    # A block of the whole expert in bfloat16, where experts are restored.
    assert found["workspace"]["restore"] == 18432
    assert found["workspace"]["shared"] == found["workspace"]["tiled"] == 0
    one, several = results["restoring"]
    assert (one["experts"], several["experts"]) == (1, 3)
    for row in (one, several):
        n = row["experts"]
        assert row["bytes"]["copy"] == 2 * n * 18432
        read = center + n * (stored - center) / 4
        assert row["bytes"]["restore"] == pytest.approx(read + n * 18432, rel=0.02)
        rates = {name: row["bytes"][name] / row["seconds"][name]["median"] for name in row["bytes"]}
        assert row["ratio"] == pytest.approx(rates["restore"] / rates["copy"])


def test_only_the_modes_asked_for_are_run(tmp_path):
    results = _run(
        tmp_path, "--shapes", "64x48x4x2", "--tokens", 2, "--modes", "shared", "--repeats", 1
    )
    (row,) = results["rows"]
    assert set(row["seconds"]) == {*DENSE, "shared"}
    assert row["choices"] == {}


def test_dense_ways_that_cannot_run_are_said_to_be_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_GATHERED_BYTES", 6 * 3 * 11 * 20 * 2)
    # Rows of 22 bytes, which PyTorch's grouped product refuses.
    results = _run(tmp_path, "--shapes", "20x11x4x2", "--tokens", 3, 4, "--repeats", 1)
    fits, does_not = results["rows"]
    assert set(fits["skipped"]) == {"grouped_mm"}
    assert set(does_not["skipped"]) == {"grouped_mm", "batched_mm"}
    assert "would copy" in does_not["skipped"]["batched_mm"]
    assert does_not["fastest_dense"] == "eager"
    cells = capsys.readouterr().out.splitlines()[3].split()
    assert cells[:2] == ["20x11x4x2", "4"] and cells[4:6] == ["-", "-"]


def test_plot_has_a_diagram_for_each_shape(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.svg"
    speed.run(kernels, [*SMALL, "--plot", str(path)])
    assert path.read_text().count('id="axes_') == 2


def test_plot_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    with mistake("must end in"):
        speed.run(kernels, [*SMALL, "--plot", str(tmp_path / "ratios.txt")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with mistake("needs matplotlib"):
        speed.run(kernels, [*SMALL, "--plot", str(tmp_path / "ratios.svg")])


def test_shapes_are_named_or_numbers():
    assert layer_shape("mixtral-half") == LayerShape("mixtral-half", 4096, 7168, 8, 2)
    assert layer_shape("8x4x3x1") == LayerShape("8x4x3x1", 8, 4, 3, 1)
    for name, shape in SHAPES.items():
        if not name.endswith("-half"):
            assert 2 * SHAPES[f"{name}-half"].rows == shape.rows
    for wrong in ("mistral", "8x4x3", "8x4x2x3", "8x0x2x1"):
        with pytest.raises(argparse.ArgumentTypeError, match=wrong):
            layer_shape(wrong)


@pytest.mark.parametrize("option", [["--keep", "0"], ["--keep", "1.5"], ["--tokens", "0"]])
def test_numbers_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        speed.run(kernels, option)
    assert "must be" in capsys.readouterr().err


def test_threads_are_this_runs_only():
    before = torch.get_num_threads()
    one = ["--shapes", "8x8x2x1", "--tokens", "1", "--modes", "shared", "--repeats", "1"]
    report = speed.run(kernels, [*one, "--threads", "2"])
    assert report["machine"]["threads"] == 2
    assert torch.get_num_threads() == before


def test_contenders_take_turns_in_changing_order():
    turns, called = speed.Turns(CPU), []
    work = {name: lambda name=name: called.append(name) for name in "abc"}
    found = [turns.seconds(work) for _ in range(20)]
    assert all(set(turn) == set("abc") and min(turn.values()) > 0 for turn in found)
    orders = {tuple(called[i : i + 3]) for i in range(0, 60, 3)}
    assert all(sorted(order) == list("abc") for order in orders)
    assert len(orders) > 3


def test_dense_way_that_is_hopeless_gets_one_turn(tmp_path, monkeypatch):
    turn = {"eager": 1.0, "batched_mm": 4.1, "shared": 100.0, "grouped_mm": 3.9}
    assert speed.hopeless(turn, DENSE) == {"batched_mm"}
    assert speed.hopeless({"shared": 1.0}, DENSE) == set()

    monkeypatch.setattr(speed, "hopeless", lambda turn, names: {"eager"})
    (row,) = _run(tmp_path, "--shapes", "64x48x4x2", "--tokens", 1, "--repeats", 3)["rows"]
    counts = {name: len(found["all"]) for name, found in row["seconds"].items()}
    assert counts == dict.fromkeys((*DENSE, *MODES), 3) | {"eager": 1}


def test_repetitions_end_in_time_but_not_before_three(monkeypatch):
    assert list(speed.repetitions(4, 1e9)) == [0, 1, 2, 3]
    monkeypatch.setattr(time, "perf_counter", iter(range(0, 1000, 2)).__next__)
    assert list(speed.repetitions(9, 0)) == [0, 1, 2]
    assert list(speed.repetitions(2, 0)) == [0, 1]
    # The clock is read once at the start, then once from the fourth on.
    assert list(speed.repetitions(9, 3)) == [0, 1, 2, 3]


def test_memory_speed_counts_what_is_read_and_written(monkeypatch):
    taken = iter(
        [{"sum": 9.0, "dot": 9.0, "copy": 9.0}] + [{"sum": 4.0, "dot": 2.0, "copy": 8.0}] * 5
    )
    monkeypatch.setattr(speed.Turns, "seconds", lambda self, work: next(taken))
    assert speed.memory_speed(CPU) == {"read": (1 << 16) / 2, "copy": (1 << 16) / 8}
