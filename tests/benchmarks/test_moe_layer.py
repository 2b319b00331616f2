"""The benchmark of one layer on ranks: all systems compute the same, and figures follow."""

from __future__ import annotations

import pytest

from benchmarks import harness, moe_layer
from tests.benchmarks.runs import SMALL
from tests.ranks import run_on_ranks

SHAPE, EXPERT_BYTES, TOKEN_BYTES = "64x48x4x2", 48 * 192 * 2, 64 * 2
OURS = {
    f"{codec} {form}"
    for codec in ("resmoe", "resmoe-dense")
    for form in ("decode, 2 lanes", "exchange, 2 lanes", "exchange, 1 lane", "shared_batch, 1 lane")
}


def _run(*arguments):
    given = ("--shapes", SHAPE, "--repeats", 2, *arguments)
    return harness.run(moe_layer, [*map(str, given)], SMALL)["results"]


@pytest.fixture(scope="module")
def results():
    """On 2 ranks, with more and with fewer tokens than ranks."""
    return run_on_ranks(2, _run, "--ep", 2, "--tp", 1, "--tokens", 1, 6)[0]


def test_all_systems_run_and_agree(results):
    assert results["skipped"] == []
    for tokens in (1, 6):
        rows = {row["system"]: row for row in results["rows"] if row["tokens"] == tokens}
        others = {name for name in rows if name.startswith(("deepspeed", "autoep", "transformers"))}
        assert set(rows) - others == OURS
        assert len(others) == 1 + 2 + 3 * 3
        assert all(0 < row["relative_error"] < 0.03 for row in rows.values())


def test_ratio_is_to_deepspeed_and_time_per_token_to_all_tokens(results):
    for row in results["rows"]:
        (baseline,) = (
            other["seconds"]["median"]
            for other in results["rows"]
            if other["tokens"] == row["tokens"] and other["system"] == "deepspeed MoE"
        )
        assert row["ratio"] == pytest.approx(baseline / row["seconds"]["median"])
        assert row["us_per_token"] == pytest.approx(1e6 * row["seconds"]["median"] / row["tokens"])
        assert all(milliseconds > 0 for milliseconds in row["stages_ms"].values())


def test_fastest_of_each_library(results):
    for found in results["fastest"]:
        rows = [row for row in results["rows"] if row["tokens"] == found["tokens"]]
        assert set(found["us"]) == {"resmoe", "resmoe-dense", "deepspeed", "autoep", "transformers"}
        for library, least in found["us"].items():
            assert least == min(
                row["us_per_token"] for row in rows if row["system"].split()[0] == library
            )


def test_bytes_on_the_wire_and_in_memory(results):
    rows = {row["system"]: row for row in results["rows"] if row["tokens"] == 6}
    # Each rank gives its whole sums to the other.
    shared = rows["resmoe shared_batch, 1 lane"]
    assert (shared["collectives"], shared["wire_bytes"]) == (1, 2 * 6 * TOKEN_BYTES)
    reduced = rows["transformers all_reduce, 1 batch (eager)"]
    assert (reduced["collectives"], reduced["wire_bytes"]) == (1, 2 * 6 * TOKEN_BYTES)
    # The lanes' sizes, then 3 tokens with two numbers and weights each, then their sums.
    decode = rows["resmoe decode, 2 lanes"]
    assert decode["wire_bytes"] == 2 * (8 + 3 * (TOKEN_BYTES + 2 * 8) + 3 * TOKEN_BYTES)
    assert rows["deepspeed MoE"]["collectives"] == 3
    assert rows["deepspeed MoE"]["rank_bytes"] == 2 * EXPERT_BYTES
    assert rows["resmoe-dense shared_batch, 1 lane"]["rank_bytes"] == 2 * EXPERT_BYTES
    assert rows["resmoe shared_batch, 1 lane"]["rank_bytes"] < 2 * EXPERT_BYTES


@pytest.mark.slow
def test_tensor_parallel_grid():
    found, *_ = run_on_ranks(4, _run, "--ep", 2, "--tp", 2, "--tokens", 5)
    assert found["skipped"] == []
    assert all(row["relative_error"] < 0.03 for row in found["rows"])
    assert {row["system"] for row in found["rows"]} >= OURS
