"""Each example, run as its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from resmoe_dist import load_model
from resmoe_dist.evaluation.perplexity import load_tokenizer
from tests.models import compress

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compress_and_load_keeps_the_logits_if_it_keeps_everything(family_folder, tmp_path):
    out = run(
        *(sys.executable, "examples/compress_and_load.py"),
        *(family_folder("mixtral"), tmp_path / "c", "--keep", "1"),
    )

    before, after = map(int, re.search(r"(\d+) bytes before, (\d+) after", out).groups())
    stored = [path.stat().st_size for path in (tmp_path / "c").glob("resmoe-*.safetensors")]
    assert 0 < before < after < sum(stored)
    difference = float(re.search(r"largest logit: (\S+)", out)[1])
    assert difference <= 1e-4


def test_layer_in_a_deepspeed_model_gives_the_same_on_every_grid(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)

    lines = []
    for grid in (("--ep", "2"), ("--tp", "2")):
        script = ("examples/layer_in_deepspeed_model.py", tmp_path / "c", *grid)
        out = run("deepspeed", "--num_gpus", "2", *script)
        lines += [line for line in out.splitlines() if line.startswith("norm")]

    assert len(lines) == 4
    assert len(set(lines)) == 1
    counts = literal_eval(lines[0].partition("tokens per expert ")[2])
    assert sum(counts) == 2 * 12  # two experts for each of the twelve tokens


def test_serve_on_a_grid_generates_what_one_process_does(embedded_source, tmp_path):
    compress(embedded_source, tmp_path / "c", groups=2)

    out = run(
        *("deepspeed", "--num_gpus", "4", "examples/serve_on_a_grid.py", tmp_path / "c"),
        *("--ep", "2", "--tp", "2", "--max-new-tokens", "12"),
    )

    model, tokenizer = load_model(tmp_path / "c"), load_tokenizer(tmp_path / "c")
    for number, prompt in enumerate(["def __init__(self, ", "import os\n", "class Error("]):
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12)
        expected = tokenizer.decode(output[0], skip_special_tokens=True)
        assert out.count(f"--- lane {number % 2}\n{expected}\n") == 1
