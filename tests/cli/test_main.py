"""The command itself: version, help, usage errors, crashes."""

from __future__ import annotations

import pytest

from resmoe_dist import __version__
from resmoe_dist.cli import checkpoint
from resmoe_dist.cli.main import COMMANDS
from tests.imports import imported_by


def test_version(run):
    assert run("--version") == (0, f"resmoe-dist {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [(), ("squeeze",), ("compress",), ("evaluate", "x"), ("verify", "x", "--fast")]
)
def test_usage_errors_are_one_line_and_exit_2(run, arguments):
    code, out, err = run(*arguments)

    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_heavy_library(arguments):
    modules, printed = imported_by(f"from resmoe_dist.cli import main; main({arguments})")

    assert modules == []
    assert "usage: resmoe-dist" in printed


def test_help_names_every_command(run):
    _, out, _ = run("--help")

    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_every_option(run, name):
    config = COMMANDS[name].config

    _, out, _ = run(name, "--help")

    for field in config.model_fields:
        shown = config.shown_name(field)
        assert (shown if shown.startswith("-") else shown.upper()) in out
    assert "--config" in out


def test_a_bug_shows_its_traceback_and_exits_1(run, monkeypatch, pristine):
    def crash(found):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint, "describe", crash)

    code, _, err = run("inspect", pristine)

    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err
