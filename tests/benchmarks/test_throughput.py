"""The benchmark of a whole model on ranks, at a tiny size."""

from __future__ import annotations

import pytest

from benchmarks import harness, throughput
from tests.benchmarks.runs import SMALL
from tests.ranks import run_on_ranks

# Two attention heads, which two ranks divide.
TINY = ("--layers", 2, "--hidden", 256, "--rows", 48, "--experts", 4)
LENGTHS = ("--input-len", 5, "--output-len", 4, "--batch-size", 4)


def _run(folder, *arguments):
    options = ("--work", folder, *TINY, *LENGTHS, "--ep", 2, "--tp", 1, "--repeats", 2)
    return harness.run(throughput, [*map(str, (*options, *arguments))], SMALL)["results"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """On 2 ranks in float32."""
    folder = tmp_path_factory.mktemp("throughput")
    return run_on_ranks(
        2, _run, folder, "--dtype", "float32", "--num-prompts", 8, "--dispatch", "decode"
    )[0]


def test_all_systems_generate_the_same_in_float32(results):
    assert results["skipped"] == []
    names = [row["system"] for row in results["rows"]]
    assert names[0] == "transformers, 1 rank (eager)"
    assert {"resmoe, 2 lanes", "resmoe, 1 lane", "resmoe-dense, 2 lanes", "deepspeed MoE"} <= {
        *names
    }
    assert "autoep (grouped_mm)" in names
    assert {f"transformers {kind} (eager)" for kind in throughput.KINDS} <= {*names}
    assert all(row["equal_tokens"] == 1 for row in results["rows"])


def test_figures_follow_from_the_moments_of_the_steps(results):
    for row in results["rows"]:
        # Two turns of two batches.
        assert len(row["ttft"]["all"]) == 4
        assert row["prefill_rate"] == pytest.approx(4 * 5 / row["ttft"]["median"])
        assert 0 < row["tpot"]["p50"] <= row["tpot"]["p95"]
        assert row["decode_rate"] > 0
        assert all(seconds > 0 for seconds in row["stages_ms"].values())
        assert row["peak_bytes"] >= row["resident_bytes"] > 0


def test_bytes_on_the_wire_are_those_of_a_decode_step(results):
    rows = {row["system"]: row for row in results["rows"]}
    token = 256 * 4
    assert rows["transformers, 1 rank (eager)"]["wire"] == {"collectives": 0, "bytes_per_token": 0}
    # Both lanes give two tokens with routing and their sums; the sizes once for two layers.
    decode = rows["resmoe, 2 lanes"]["wire"]
    assert decode["collectives"] == 2.5
    assert decode["bytes_per_token"] == (2 * 2 * (token + 2 * 8) + 2 * 2 * token + 2 * 8 / 2) / 4


def test_padding_and_imbalance_of_every_system(results):
    rows = {row["system"]: row for row in results["rows"]}
    for row in rows.values():
        for phase in ("prefill", "decode"):
            assert row[phase]["padding"] >= 0
            assert 1 <= row[phase]["imbalance"]["ranks"] <= row[phase]["imbalance"]["experts"] <= 4
    # Our experts compute nothing else than the batch's copies; stock DeepSpeed fills a capacity.
    for name in ("resmoe, 2 lanes", "resmoe, 1 lane", "transformers all_reduce (eager)"):
        assert rows[name]["prefill"]["padding"] == rows[name]["decode"]["padding"] == 0
    assert rows["deepspeed MoE"]["prefill"]["padding"] > 0
    # One process sends nothing.
    assert rows["transformers, 1 rank (eager)"]["decode"]["empty_rows"] is None
    assert rows["deepspeed MoE"]["decode"]["empty_rows"] > 0
