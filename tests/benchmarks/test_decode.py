"""The benchmark of decoding on a tiny model: same tokens, and figures that are what they say."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decode, speed
from benchmarks.decode import DENSE, MODES
from resmoe_dist.runtime.layer import ResMoE
from tests.checkpoints.damage import mistake

TINY = ["--layers", "2", "--hidden", "64", "--rows", "48", "--experts", "4"]
SHORT = ["--new-tokens", "4", "--repeats", "2"]
ENTRIES = 48 * 192  # of an expert


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which later runs find what an earlier one made."""
    return tmp_path_factory.mktemp("decode")


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Nothing here is about true speed, nor may it depend on it."""
    monkeypatch.setattr(speed, "_EVICTING_BYTES", 1 << 16)
    monkeypatch.setattr(speed, "_HOPELESS", 1e9)


def _run(work, *arguments):
    """Results of the benchmark, as `--json` wrote them."""
    path = work / "results.json"
    options = ["--work", str(work), *TINY, *SHORT, *map(str, arguments), "--json", str(path)]
    report = speed.run(decode, options)
    assert json.loads(path.read_text()) == report
    return report["results"]


def _files(work):
    """The models' files, and when each was made."""
    return {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}


def test_all_ways_generate_the_same_in_float32(work, capsys):
    results = _run(work, "--dtype", "float32", "--batches", 1, 3)

    assert [row["batch"] for row in results["rows"]] == [1, 3]
    for row in results["rows"]:
        seconds = {name: found["median"] for name, found in row["seconds"].items()}
        assert set(seconds) == {*DENSE, *MODES} and not row["skipped"]
        assert row["fastest_dense"] == min(DENSE, key=seconds.get)
        for name, found in row["seconds"].items():
            assert len(found["all"]) == 2
            assert row["tokens_per_second"][name] == 4 * row["batch"] / seconds[name]
            fastest = seconds[row["fastest_dense"]]
            assert row["ratios"][name] == pytest.approx(fastest / seconds[name])
        assert set(row["equal_tokens"].values()) == {1.0}
    assert results["launcher"] == []
    text = capsys.readouterr().out
    assert all(f"{row['tokens_per_second']['auto']:.1f}" in text for row in results["rows"])


def test_memory_is_that_of_experts_and_of_everything_else(work):
    results = _run(work, "--batches", 1, "--modes", "shared", "restore")["memory"]

    # Embedding, head, and per layer four projections of attention (one head), norms and router.
    others = 2 * (2 * 1000 * 64 + 64 + 2 * (4 * 64 * 64 + 2 * 64 + 4 * 64))
    kept = ENTRIES // 4
    compressed = 2 * (2 * ENTRIES + 4 * (ENTRIES // 8 + 2 * kept + 4 * 49))
    assert results["dense"]["experts"] == 2 * 4 * 2 * ENTRIES
    assert results["dense"]["workspace"] == results["shared"]["workspace"] == 0
    assert results["restore"]["workspace"] == 2 * ENTRIES
    for name, found in results.items():
        # Beside the weights, the rotary embedding's frequencies.
        assert others <= found["others"] <= others + 1024
        if name != "dense":
            assert found["experts"] == pytest.approx(compressed, rel=0.001)


def test_models_of_an_earlier_run_are_used_again(work):
    _run(work, "--batches", 1, "--modes", "shared")
    before = _files(work)
    results = _run(work, "--batches", 2, "--modes", "shared")
    assert before and _files(work) == before
    (row,) = results["rows"]
    assert set(row["seconds"]) == {*DENSE, "shared"}
    assert all(0 <= share <= 1 for share in row["equal_tokens"].values())


def test_folder_of_another_model_is_refused(work):
    _run(work, "--batches", 1, "--modes", "shared")
    with mistake("holds another model"):
        _run(work, "--seed", 1)
    (work / "source" / "config.json").rename(work / "config.json")
    try:
        (work / "source").rename(work / "kept")
        with mistake("of another model"):
            _run(work, "--seed", 1)
    finally:
        decode.shutil.rmtree(work / "source", ignore_errors=True)
        (work / "kept").rename(work / "source")
        (work / "config.json").rename(work / "source" / "config.json")


def test_other_tokens_in_float32_are_an_error(work, monkeypatch):
    def wrong(model, ids_BS, new_tokens):
        found_BN = right(model, ids_BS, new_tokens)
        compressed = any(isinstance(module, ResMoE) for module in model.modules())
        return found_BN + 1 if compressed else found_BN

    right = decode._generate
    monkeypatch.setattr(decode, "_generate", wrong)
    options = ["--batches", 2, "--modes", "shared"]
    with pytest.raises(RuntimeError, match="2 sequences: shared generates other tokens"):
        _run(work, "--dtype", "float32", *options)
    (row,) = _run(work, *options)["rows"]
    assert row["equal_tokens"]["shared"] < 1
    assert row["equal_tokens"]["eager"] == 1


def test_sequences_are_as_long_as_asked_for_and_prompts_change(work, monkeypatch):
    calls = []

    def watched(model, ids_BS, new_tokens):
        found_BN = right(model, ids_BS, new_tokens)
        calls.append((ids_BS, found_BN))
        return found_BN

    right = decode._generate
    monkeypatch.setattr(decode, "_generate", watched)
    _run(work, "--batches", 3, "--modes", "restore", "--prompt-tokens", 2, "--new-tokens", 40)

    # Four ways are tried, the dense ones twice; then all take two turns.
    assert [new_BN.shape for _, new_BN in calls] == [(3, 2)] * 7 + [(3, 40)] * 8
    prompts = [ids_BS for ids_BS, _ in calls]
    assert all(ids_BS.shape == (3, 2) for ids_BS in prompts)
    for first in (7, 11):
        assert all(torch.equal(prompts[first], other) for other in prompts[first : first + 4])
    assert not torch.equal(prompts[7], prompts[11])


def test_gathering_too_much_is_said_to_be_left_out(work, monkeypatch, capsys):
    monkeypatch.setattr(decode, "_GATHERED_BYTES", 2 * 2 * 2 * ENTRIES)
    one, three = _run(work, "--batches", 2, 3, "--modes", "shared")["rows"]
    assert not one["skipped"]
    assert set(three["skipped"]) == {"batched_mm"}
    assert "batched_mm left out at 3 sequences: would copy" in capsys.readouterr().out


def test_hopeless_dense_way_is_said_to_be_left_out(work, monkeypatch, capsys):
    monkeypatch.setattr(speed, "_HOPELESS", 1)
    (row,) = _run(work, "--batches", 1, "--modes", "shared")["rows"]
    (left,) = set(DENSE) & set(row["seconds"])
    assert row["fastest_dense"] == left
    assert set(row["skipped"]) == set(DENSE) - {left}
    assert row["equal_tokens"][left] == 1
    assert "times as long as the fastest of them" in capsys.readouterr().out


@pytest.mark.slow
def test_launcher_is_run_on_both_folders(work, capsys):
    results = _run(
        work, "--batches", 2, "--modes", "shared", "--launcher", "--threads", 1, "--repeats", 1
    )
    (row,) = results["launcher"]
    dense, compressed = (row["tokens_per_second"][kind] for kind in ("dense", "compressed"))
    assert len(dense["all"]) == len(compressed["all"]) == 1
    assert dense["median"] > 0
    assert row["ratio"] == compressed["median"] / dense["median"]
    assert f"{compressed['median']:.1f}" in capsys.readouterr().out
