"""`resmoe-dist evaluate`: what it prints, and mistakes in a single line."""

from __future__ import annotations

import json
import math

import pytest

from resmoe_dist.launch import evaluate as launch_evaluate
from tests.checkpoints.damage import edit_text
from tests.cli.commands import assert_mistake


def test_evaluate_prints_and_writes_the_same(run, pristine, tmp_path):
    edit_text(tmp_path / "ids.json", "[[3, 4, 5, 6], [7, 8]]")
    arguments = ("--token-ids", tmp_path / "ids.json", "--json", tmp_path / "e.json")
    code, out, err = run("evaluate", pristine, *arguments)

    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["tokens"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert out == f"perplexity {found['perplexity']:.6g}  nll {found['nll']:.6g}  tokens 4\n"


@pytest.mark.parametrize(
    ("option", "content", "text"),
    [
        ("--token-ids", "{cut", "not a readable JSON file"),
        ("--token-ids", "[]", "must be a JSON list of sequences"),
        ("--token-ids", "[[3]]", "sequence 0 must be a list of two or more token ids"),
        ("--token-ids", "[[3, 4], [5, 64]]", "sequence 1 has token id 64, the model's end at 63"),
        ("--token-ids", None, "not a readable JSON file"),
        ("--text", "some text", "no tokenizer could be loaded"),
    ],
)
def test_evaluate_refuses_unusable_text_and_tokens(run, pristine, tmp_path, option, content, text):
    if content is not None:
        edit_text(tmp_path / "input", content)
    assert_mistake(run("evaluate", pristine, option, tmp_path / "input"), text)


def test_evaluate_reads_its_input_before_it_loads_the_model(run, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(
        launch_evaluate, "load_model", lambda *args, **kwargs: pytest.fail("loaded")
    )
    outcome = run("evaluate", pristine, "--token-ids", tmp_path / "none")
    assert_mistake(outcome, "not a readable JSON file")


def test_evaluate_refuses_a_context_of_one_token(run, pristine, tmp_path):
    outcome = run("evaluate", pristine, "--text", tmp_path / "text", "--context", 1)
    assert_mistake(outcome, "--context 1: must be 2 or more")


def test_evaluate_refuses_a_missing_model(run, tmp_path):
    edit_text(tmp_path / "ids.json", "[[3, 4]]")
    outcome = run("evaluate", tmp_path / "none", "--token-ids", tmp_path / "ids.json")
    assert_mistake(outcome, f"{tmp_path}/none: no such folder")
