"""Options and reports that all benchmarks share."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import harness
from tests.checkpoints.damage import mistake


@pytest.fixture
def counting(monkeypatch):
    """A benchmark that reports its options and how often the clock repeats."""
    module = ModuleType("counting", "Count repeats.\n\nMore text.")
    module.__file__ = "/somewhere/counting.py"
    module.TABLES = (("rows", "repeats"), ("nothing", "x"))
    module.add_arguments = lambda parser: parser.add_argument("--size", type=harness.share)

    def measure(args, clock):
        row = {"repeats": len(list(clock.repeats())), "threads": torch.get_num_threads()}
        return {"rows": [row], "nothing": []}

    module.measure = measure
    monkeypatch.setitem(sys.modules, "counting", module)
    return module


def test_report_has_options_machine_and_results(counting, capsys):
    report = harness.run(counting, ["--repeats", "4", "--size", "0.5", "--seed", "7"])
    assert report["options"] == {
        "benchmark": "counting",
        "threads": None,
        "device": "cpu",
        "repeats": 4,
        "seconds": None,
        "seed": 7,
        "size": 0.5,
        "json": None,
    }
    assert report["results"]["rows"][0]["repeats"] == 4
    machine = report["machine"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 1e8
    out = capsys.readouterr().out
    assert out.startswith("repeats\n-------\n4\n\n") and torch.__version__ in out


def test_benchmarks_that_share_a_command_are_named_like_their_files(counting, capsys):
    report = harness.run([counting], ["counting", "--repeats", "2"])
    assert report["results"]["rows"][0]["repeats"] == 2
    with pytest.raises(SystemExit):
        harness.run([counting], ["--help"])
    assert "Count repeats." in capsys.readouterr().out


def test_threads_are_those_of_this_run_only(counting):
    before = torch.get_num_threads()
    report = harness.run(counting, ["--threads", str(before + 1)])
    assert report["results"]["rows"][0]["threads"] == report["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("option", [["--repeats", "0"], ["--size", "0"], ["--size", "1.5"]])
def test_numbers_out_of_range_are_refused(counting, option, capsys):
    with pytest.raises(SystemExit):
        harness.run(counting, option)
    assert "must be" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_refused(counting):
    with mistake("no CUDA device"):
        harness.run(counting, ["--device", "cuda"])
