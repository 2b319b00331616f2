"""The benchmark of decoding on a tiny model: same tokens, and figures that are consistent."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from benchmarks import decode
from benchmarks.timing import Clock
from benchmarks.ways import DENSE, MODES
from tests.benchmarks.runs import SMALL, results_of
from tests.checkpoints.damage import mistake

TINY = ("--layers", 2, "--hidden", 64, "--rows", 48, "--experts", 4)
ENTRIES = 48 * 192  # of an expert


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which later runs find what an earlier one made."""
    return tmp_path_factory.mktemp("decode")


def measure(work, *arguments, **effort):
    options = ("--work", work, *TINY, "--new-tokens", 4, "--repeats", 2, *arguments)
    return results_of(decode, work, *options, **effort)


def test_all_ways_generate_the_same_in_float32(work):
    results = measure(work, "--dtype", "float32", "--batches", 1, 3)

    assert results["skipped"] == results["launcher"] == []
    assert [(row["batch"], row["way"]) for row in results["rows"]] == [
        (batch, way) for batch in (1, 3) for way in (*DENSE, *MODES)
    ]
    for row in results["rows"]:
        same_batch = [other for other in results["rows"] if other["batch"] == row["batch"]]
        dense = [other["seconds"]["median"] for other in same_batch if other["way"] in DENSE]
        assert len(row["seconds"]["all"]) == 2
        assert row["tokens_per_second"] == 4 * row["batch"] / row["seconds"]["median"]
        assert row["ratio"] == pytest.approx(min(dense) / row["seconds"]["median"])
        assert row["equal_tokens"] == 1


def test_memory_is_that_of_experts_and_of_everything_else(work):
    results = measure(work, "--batches", 1, "--modes", "shared", "restore")
    found = {row["model"]: row for row in results["memory"]}

    # Embedding, head, and per layer four projections of attention (one head), norms and router.
    others = 2 * (2 * 1000 * 64 + 64 + 2 * (4 * 64 * 64 + 2 * 64 + 4 * 64))
    compressed = 2 * (2 * ENTRIES + 4 * (ENTRIES // 8 + 2 * (ENTRIES // 4) + 4 * 49))
    assert found["dense"]["experts"] == 2 * 4 * 2 * ENTRIES
    assert found["dense"]["workspace"] == found["shared"]["workspace"] == 0
    assert found["restore"]["workspace"] == 2 * ENTRIES
    for name, row in found.items():
        # Beside the weights, the frequencies of the rotary embedding.
        assert others <= row["others"] <= others + 1024
        if name != "dense":
            assert row["experts"] == pytest.approx(compressed, rel=0.001)


def test_models_of_an_earlier_run_are_used_again(work):
    def files():
        return {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}

    measure(work, "--batches", 1, "--modes", "shared")
    before = files()
    results = measure(work, "--batches", 2, "--modes", "shared")
    assert before and files() == before
    assert [row["way"] for row in results["rows"]] == [*DENSE, "shared"]
    assert all(0 <= row["equal_tokens"] <= 1 for row in results["rows"])


def test_folder_of_another_model_is_refused(work):
    measure(work, "--batches", 1, "--modes", "shared")
    with mistake("holds another model"):
        measure(work, "--seed", 1)
    (work / "source").rename(work / "kept")
    try:
        with mistake("of another model"):
            measure(work, "--seed", 1)
    finally:
        (work / "source").rename(work / "other")
        (work / "kept").rename(work / "source")


class Recorder:
    """A way to generate that returns fixed tokens, and records its prompts."""

    def __init__(self, change: int = 0) -> None:
        self.change, self.prompts = change, []

    def __call__(self, ids_BS, new_tokens):
        self.prompts.append((ids_BS, new_tokens))
        tokens_BN = torch.arange(len(ids_BS) * new_tokens).view(-1, new_tokens)
        return tokens_BN + self.change


def options(**given):
    """Options of a tiny model."""
    sizes = {"hidden": 64, "rows": 48, "experts": 4, "seed": 0}
    return Namespace(**sizes, **{"prompt_tokens": 1, "dtype": "bfloat16"} | given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_tokens_are_an_error_in_float32_and_a_share_in_bfloat16(dtype):
    args = options(dtype=dtype, new_tokens=4)
    ways = {"eager": Recorder(), "shared": Recorder(change=1)}
    clock = Clock(repeats=2, effort=SMALL)
    if dtype == "float32":
        with pytest.raises(RuntimeError, match="2 sequences: shared generates different tokens"):
            decode.measure_batch(args, clock, ways, batch=2)
    else:
        rows, _ = decode.measure_batch(args, clock, ways, batch=2)
        assert [row["equal_tokens"] for row in rows] == [1, 0]


def test_all_ways_get_the_same_prompts_which_change_with_every_repeat():
    args = options(prompt_tokens=2, new_tokens=40)
    ways = {name: Recorder() for name in ("eager", "grouped_mm", "restore")}
    decode.measure_batch(args, Clock(repeats=2, effort=SMALL), ways, batch=3)

    for recorder in ways.values():
        assert [new_tokens for _, new_tokens in recorder.prompts] == [2, 40, 40]
        assert all(ids_BS.shape == (3, 2) for ids_BS, _ in recorder.prompts)
    for repeat in (1, 2):
        first, *others = [recorder.prompts[repeat][0] for recorder in ways.values()]
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(ways["eager"].prompts[1][0], ways["eager"].prompts[2][0])


def test_gathering_too_much_is_listed_with_the_reason(work):
    choice = ("--batches", 2, 3, "--modes", "shared")
    results = measure(work, *choice, gathered_bytes=2 * 2 * 2 * ENTRIES)
    (skipped,) = results["skipped"]
    assert (skipped["batch"], skipped["way"]) == (3, "batched_mm")
    assert "would copy" in skipped["reason"]


@pytest.mark.slow
def test_launcher_is_run_on_both_folders(work):
    choice = ("--batches", 2, "--modes", "shared", "--launcher", "--threads", 1, "--repeats", 1)
    (row,) = measure(work, *choice)["launcher"]
    dense, compressed = (row["tokens_per_second"][kind] for kind in ("dense", "compressed"))
    assert len(dense["all"]) == len(compressed["all"]) == 1
    assert dense["median"] > 0
    assert row["ratio"] == compressed["median"] / dense["median"]
