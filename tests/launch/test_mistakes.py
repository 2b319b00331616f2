"""Mistakes in the options of launch scripts: one line from all ranks, exit code 2, no ranks."""

from __future__ import annotations

import pytest

from tests.launch.commands import own_lines, run

pytestmark = pytest.mark.slow

TWO_RANKS = ("deepspeed", "--num_gpus", "2")
# Options themselves are tested in tests/config; here, that several ranks report them once.
MISTAKES = {
    "unknown option": (("launch/infer.py", "--eep", "2"), "unrecognized arguments: --eep 2"),
    "missing data": (("launch/evaluate.py", "model", "--ep", "2"), "give --text or --token-ids"),
    "no such model": (
        ("launch/infer.py", "--ep", "2", "--model", "nowhere", "--prompt", "import"),
        "nowhere: no such folder",
    ),
}


def assert_one_line(outcome, text):
    """Exit code 2, and one line that contains `text`."""
    code, out, err = outcome
    assert code == 2
    assert "Traceback" not in out + err
    (line,) = own_lines(err)
    assert line.startswith("error: ")
    assert text in line


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_from_two_ranks(name):
    arguments, text = MISTAKES[name]

    assert_one_line(run(*TWO_RANKS, *arguments), text)


def test_a_mistake_is_found_before_ranks_are_started_on_a_cpu(compressed, tmp_path):
    # A single process: the ranks would be started by it, with a line that says so.
    outcome = run(
        *("python", "launch/evaluate.py", compressed, "--ep", "2"),
        *("--text", tmp_path / "none.txt"),
    )

    assert_one_line(outcome, "none.txt")


def test_a_mistake_is_one_line_under_mpirun(tmp_path):
    code, out, err = run(
        *("mpirun", "-n", "2", "python", "launch/compress.py"),
        *(tmp_path / "s", tmp_path / "o", "--ep", "two"),
    )

    assert code == 2
    assert err.count("error: --ep two: not a whole number\n") == 1
    assert "Traceback" not in out + err
