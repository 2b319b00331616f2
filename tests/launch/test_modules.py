"""The launch package without a clone of the repository: `python -m` and `deepspeed --module`."""

from __future__ import annotations

import json

import pytest

from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.topology import SINGLE_PROCESS
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.loading import load_model
from tests.launch.commands import own_lines, run

pytestmark = pytest.mark.slow

PROMPT = "def __init__(self"
TOKENS = 8
STARTS = {
    "python -m": ("python", "-m", "resmoe_dist.launch.infer"),
    "deepspeed --module": ("deepspeed", "--module", "resmoe_dist.launch.infer"),
    "deepspeed --module with ranks": (
        *("deepspeed", "--num_gpus", "2", "--module", "resmoe_dist.launch.infer"),
    ),
}


@pytest.fixture(scope="module")
def expected(compressed) -> str:
    """The completion by one process."""
    output = generate_on_lane(
        load_model(compressed),
        load_tokenizer(compressed),
        [PROMPT],
        SINGLE_PROCESS,
        GenerationOptions(TOKENS),
    )
    return output.completions[0]


@pytest.mark.parametrize("start", STARTS)
def test_infer_runs_as_a_module_on_two_ranks(start, compressed, expected, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text(f"tp: 2\nmodel: {compressed}\nmax-new-tokens: {TOKENS}\n")

    code, _, err = run(
        *STARTS[start], "--config", options, "--prompt", PROMPT, "--json", tmp_path / "r.json"
    )

    assert code == 0, err
    restarted = "with ranks" not in start
    line = "no accelerator here: starting 2 ranks on the CPU"
    assert own_lines(err) == [line] * restarted
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(rank["lane"], rank["tp_rank"]) for rank in result["ranks"]] == [(0, 0), (0, 1)]
    assert [each["completion"] for each in result["completions"]] == [expected]
