"""`resmoe-dist evaluate`: what it prints, and mistakes in a single line."""

from __future__ import annotations

import json
import math

import pytest

from resmoe_dist.launch import evaluate as launch_evaluate
from tests.checkpoints.damage import copy_of, edit_json, edit_text, flip_byte_of
from tests.cli.commands import GROUP, assert_mistake


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


@pytest.fixture
def ids(tmp_path):
    """Arguments with two sequences to score."""
    edit_text(tmp_path / "ids.json", "[[3, 4, 5, 6], [7, 8]]")
    return ("--token-ids", tmp_path / "ids.json")


def test_a_loss_that_is_not_finite_is_no_result(run, pristine, tmp_path, ids):
    folder = copy_of(pristine, tmp_path / "c")
    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=float("nan")))

    outcome = run("evaluate", folder, *ids, "--json", tmp_path / "e.json")

    assert_mistake(outcome, "the loss is nan")
    assert not (tmp_path / "e.json").exists()


def test_an_infinite_perplexity_is_null_in_json(run, pristine, tmp_path, ids, monkeypatch):
    result = launch_evaluate.Evaluation(nll=1000.0, tokens=4)
    monkeypatch.setattr(launch_evaluate, "evaluate", lambda *_: result)

    code, out, _ = run("evaluate", pristine, *ids, "--json", tmp_path / "e.json")

    assert (code, out) == (0, "perplexity inf  nll 1000  tokens 4\n")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "e.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "perplexity": None,
        "nll": 1000.0,
        "tokens": 4,
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_experts_per_tok": 9}, "the model does not run"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "no language-model head"),
        ({"architectures": ["MixtralForTokenClassification"]}, "no language-model head"),
        ({"architectures": ["MixtralModel"]}, "no language-model head"),
        ({"architectures": None}, "'architectures' is None"),
        ({"architectures": 5}, "config.json"),
    ],
)
def test_a_model_that_cannot_be_scored_is_refused(run, pristine, tmp_path, ids, values, text):
    folder = copy_of(pristine, tmp_path / "c")
    edit_json(folder / "config.json", lambda config: config.update(values))

    assert_mistake(run("evaluate", folder, *ids), text)


@pytest.mark.parametrize("place", ["none/e.json", "folder"])
@pytest.mark.parametrize("command", ["evaluate", "inspect", "plan"])
def test_output_paths_are_checked_before_the_work(
    run, pristine, tmp_path, ids, monkeypatch, command, place
):
    (tmp_path / "folder").mkdir()
    for module, work in (
        ("launch.evaluate", "load_model"),
        ("cli.checkpoint", "describe"),
        ("cli.plan", "read_structure"),
    ):
        monkeypatch.setattr(f"resmoe_dist.{module}.{work}", lambda *_, **__: pytest.fail("worked"))
    arguments = ids if command == "evaluate" else ()

    outcome = run(command, pristine, *arguments, "--json", tmp_path / place)

    assert_mistake(outcome, f"{tmp_path}/{place.split('/')[0]}: ")


def test_verify_option_finds_a_flipped_value(run, pristine, tmp_path, ids):
    folder = copy_of(pristine, tmp_path / "c")
    flip_byte_of(folder / GROUP, "experts.0.values")

    assert run("evaluate", folder, *ids).code == 0
    assert_mistake(run("evaluate", folder, *ids, "--verify"), f"{GROUP}: its sha256 differs")


@pytest.mark.parametrize("command", ["evaluate", "verify", "inspect"])
def test_a_launchers_variables_do_not_make_one_process_a_rank(
    run, pristine, tmp_path, ids, monkeypatch, command
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert run(command, pristine, *(ids if command == "evaluate" else ())).code == 0
    failed = run(command, tmp_path / "none", *(ids if command == "evaluate" else ()))
    assert failed.code == 2
    assert "rank" not in failed.err
