"""The launch scripts as a user starts them: real launcher, real ranks, real exit codes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from resmoe_dist.evaluation.perplexity import evaluate, load_tokenizer
from resmoe_dist.parallel.topology import SINGLE_PROCESS
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.loading import load_model
from tests.jobs.runs import REPOSITORY
from tests.launch.commands import own_lines, run

PROMPTS = ["def __init__(self", "import os\n", "class Error"]
TOKENS = 12

pytestmark = pytest.mark.slow


def test_infer_starts_its_ranks_and_prints_each_completion_once(compressed, tmp_path):
    options = [arg for prompt in PROMPTS for arg in ("--prompt", prompt)]
    code, out, err = run(
        *("deepspeed", "launch/infer.py", "--ep", "2", "--tp", "2", "--lanes", "2"),
        *("--model", compressed, "--max-new-tokens", str(TOKENS)),
        *("--json", tmp_path / "r.json", *options),
    )

    assert code == 0, err
    assert own_lines(err) == ["no accelerator here: starting 4 ranks on the CPU"]
    expected = generate_on_lane(
        load_model(compressed),
        load_tokenizer(compressed),
        PROMPTS,
        SINGLE_PROCESS,
        GenerationOptions(TOKENS),
    ).completions
    result = json.loads((tmp_path / "r.json").read_text())
    assert [c["completion"] for c in result["completions"]] == list(expected.values())
    places = [out.index(f"{prompt}{expected[i]}") for i, prompt in enumerate(PROMPTS)]
    assert places == sorted(places)
    assert all(out.count(f"--- {i + 1}: ") == 1 for i in range(len(PROMPTS)))
    assert [(r["lane"], r["tp_rank"]) for r in result["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert result["ranks"][3]["experts"] == [4, 5, 6, 7]


def test_evaluate_on_a_grid_gives_the_single_process_perplexity(compressed, tmp_path):
    tokenizer = load_tokenizer(compressed)
    ids = tokenizer(Path(__file__).read_text())["input_ids"]
    sequences = [ids[i * 60 : i * 60 + 50 + i] for i in range(5)]
    (tmp_path / "ids.json").write_text(json.dumps(sequences))

    code, _, err = run(
        # Each rank holds half of the embeddings.
        *("deepspeed", "--num_gpus", "4", "launch/evaluate.py", compressed),
        *(
            "--ep",
            "2",
            "--tp",
            "2",
            "--token-ids",
            tmp_path / "ids.json",
            "--json",
            tmp_path / "r.json",
        ),
    )

    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    expected = evaluate(load_model(compressed), sequences)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert result["tokens"] == expected.tokens


def test_one_failing_rank_ends_all_ranks_with_one_line(compressed, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(compressed, folder)
    (bad,) = folder.glob("resmoe-00002-*-group-003.safetensors")
    bad.write_bytes(bad.read_bytes()[:-100])  # only the last EP rank opens this file

    code, out, err = run(
        *("deepspeed", "--num_gpus", "4", "launch/infer.py", "--ep", "4", "--model", folder),
        *("--prompt", "import"),
    )

    assert code == 2
    assert "Traceback" not in out + err
    (line,) = own_lines(err)
    assert line.startswith("error: ") and bad.name in line


def test_a_single_prompt_appears_once_on_a_terminal(compressed):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "launch/infer.py", "--model", compressed, "--prompt", PROMPTS[0]],
        stdout=end,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    os.close(end)
    shown = b""
    # Reading fails when the process has ended and closed the terminal.
    with suppress(OSError):
        while data := os.read(terminal, 4096):
            shown += data
    assert process.wait(timeout=60) == 0

    expected = generate_on_lane(
        load_model(compressed),
        load_tokenizer(compressed),
        PROMPTS[:1],
        SINGLE_PROCESS,
        GenerationOptions(64),
    ).completions[0]
    text = shown.decode().replace("\r\n", "\n")
    assert text.count(f"--- 1: {PROMPTS[0]!r}\n{PROMPTS[0]}{expected}\n") == 1
    assert text.count(PROMPTS[0]) == 2
