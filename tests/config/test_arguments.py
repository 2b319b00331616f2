"""Configurations from the command line, its help, and mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import (
    CompressConfig,
    EvaluateConfig,
    GridEvaluateConfig,
    InferConfig,
    RestoreConfig,
)
from tests.checkpoints.damage import mistake


def test_values_are_typed():
    config = parse(
        CompressConfig,
        "",
        ["s", "o", "--ep", "2", "--target-bytes", "35%", "--max-memory", "8GB", "--resume"],
    )

    assert (config.ep, config.target_bytes, config.max_memory) == (2, 0.35, 8 * 10**9)
    assert config.resume is True
    assert config.source == Path("s")


@pytest.mark.parametrize(
    "arguments",
    [
        ["s", "o", "--ep", "2"],
        ["s", "--ep", "2", "o"],
        ["--ep", "2", "s", "o"],
        ["--ep", "2", "s", "--keep", "0.5", "o"],
    ],
)
def test_folders_may_stand_anywhere_between_options(arguments):
    config = parse(CompressConfig, "", arguments)

    assert (config.source, config.output, config.ep) == (Path("s"), Path("o"), 2)


def test_the_launchers_local_rank_is_accepted():
    assert parse(InferConfig, "", ["--local_rank=3", "--ep", "2"]).ep == 2


def test_prompts_are_collected():
    assert parse(InferConfig, "", ["--prompt", "a", "--prompt", "b"]).prompt == ["a", "b"]


@pytest.mark.parametrize("kind", [InferConfig, GridEvaluateConfig, CompressConfig])
def test_help_of_a_script_explains_every_option(kind, capsys):
    with pytest.raises(SystemExit) as left:
        parse(kind, "", ["--help"])

    assert left.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, field in kind.model_fields.items():
        shown = kind.shown_name(name)
        assert (shown if shown.startswith("-") else shown.upper()) in out
        # Line breaks and hyphenation of help texts differ with the width of the terminal.
        assert field.description and field.description.split()[0] in out


def test_values_that_look_like_options_follow_an_equals_sign():
    assert parse(InferConfig, "", ["--prompt=--help"]).prompt == ["--help"]


MISTAKES = {
    "two values of keep": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--keep", "0.5", "--codec", "pruned:keep=0.25"],
        "--keep and --codec pruned:keep=0.25 both say how much to keep",
    ),
    "a share of bytes and keep": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--target-bytes", "35%", "--codec", "low_rank:rank=3,keep=0.25"],
        "--target-bytes and --codec low_rank:rank=3,keep=0.25 both say how much to keep",
    ),
    "unknown option": (RestoreConfig, ["f", "o", "--fast"], "unrecognized arguments: --fast; see"),
    "one folder too many": (RestoreConfig, ["f", "o", "p"], "unrecognized arguments: p; see"),
    "option without its value": (RestoreConfig, ["f", "o", "--dtype"], "--dtype: expected one arg"),
    "missing argument": (CompressConfig, ["--ep", "2"], "SOURCE is missing"),
    "missing option": (CompressConfig, ["s", "o"], "--ep is missing"),
    "not a number": (CompressConfig, ["s", "o", "--ep", "x"], "--ep x: not a whole number"),
    "unknown choice": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--align", "best"],
        "--align best: choose one of loo, pot, ot_fusion or none",
    ),
    "not a size": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--max-memory", "much"],
        "--max-memory much: not a size; write 8GB or 7500MiB",
    ),
    "not a share": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--target-bytes", "half"],
        "--target-bytes half: not a share",
    ),
    "excluded pair": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--keep", "1", "--target-bytes", "1"],
        "--keep and --target-bytes exclude each other",
    ),
    "no data": (EvaluateConfig, ["m"], "give --text or --token-ids or --tasks"),
    "context of one": (
        EvaluateConfig,
        ["m", "--text", "t", "--context", "1"],
        "--context 1: must be 2 or more",
    ),
    "temperature of zero": (InferConfig, ["--temperature", "0"], "--temperature 0: must be above"),
    "top-p alone": (InferConfig, ["--top-p", "0.9"], "--top-p 0.9: needs --temperature"),
    "no new tokens": (InferConfig, ["--max-new-tokens", "0"], "--max-new-tokens 0: must be 1"),
    "empty prompt": (InferConfig, ["--prompt", ""], "a prompt is empty"),
    "empty grid": (InferConfig, ["--ep", "0"], "--ep 0 --tp 1: both must be 1 or more"),
    "cache without size": (InferConfig, ["--execution", "cached"], "--cache-size SIZE need each"),
    "size without cache": (InferConfig, ["--cache-size", "1GB"], "--cache-size SIZE need each"),
    "unknown preset": (
        CompressConfig,
        ["s", "o", "--ep", "1", "--preset", "best"],
        "--preset best: choose one of default, paper",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name):
    kind, arguments, text = MISTAKES[name]

    with mistake(text):
        parse(kind, "", arguments)
