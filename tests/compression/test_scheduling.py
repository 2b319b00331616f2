"""The same files come out of one process and of many, and one rank's failure ends all."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resmoe_dist.checkpoints.compressed import CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.pipeline import Compression
from resmoe_dist.compression.scheduling import (
    DeepSpeedWorkers,
    SingleWorker,
    find_workers,
    together,
)
from resmoe_dist.errors import UserError
from resmoe_dist.parallel.launcher import free_port
from tests.checkpoints.damage import copy_of, edit_tensors, mistake, names_in
from tests.models import compress
from tests.ranks import run_on_ranks

REPOSITORY = Path(__file__).parents[2]
# Tasks are dealt out in turn: of two ranks, the second has the second group of the first layer.
EXPERT_OF_RANK_1 = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _harmed(source, target):
    copy_of(source, target)
    edit_tensors(target / "model.safetensors", lambda t: t[EXPERT_OF_RANK_1][0, 0].fill_(math.nan))
    return target


def _launch(*command, timeout=200):
    """Run one of the launchers of this Python's environment on launch/compress.py."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": tools,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    if shutil.which(command[0], path=tools) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def expected(family_folder, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("scheduling") / "c"
    compress(family_folder("mixtral"), folder, groups=2)
    return _contents(folder)


@pytest.mark.slow
def test_mpirun_writes_what_one_process_does(family_folder, expected, tmp_path):
    done = _launch(
        *("mpirun", "-n", 2, "python", "launch/compress.py"),
        *(family_folder("mixtral"), tmp_path / "c", "--ep", 2),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all experts") == 1  # one rank reports
    assert _contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


@pytest.mark.slow
def test_mpirun_stops_with_one_line_when_one_rank_fails(family_folder, tmp_path):
    source = _harmed(family_folder("mixtral"), tmp_path / "source")
    done = _launch(
        *("mpirun", "-n", 2, "python", "launch/compress.py", source, tmp_path / "c", "--ep", 2)
    )
    assert done.returncode == 2
    (line,) = _errors(done.stderr)
    assert f"{source}/model.safetensors: tensor '{EXPERT_OF_RANK_1}' holds NaN" in line
    assert "Traceback" not in done.stderr
    assert names_in(tmp_path) == {"source"}


@pytest.mark.slow
def test_deepspeed_writes_what_one_process_does(family_folder, expected, tmp_path):
    done = _launch(
        *("deepspeed", "--num_gpus", 2, "--master_port", free_port(), "launch/compress.py"),
        *(family_folder("mixtral"), tmp_path / "c", "--ep", 2),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all experts") == 1
    assert _contents(tmp_path / "c") == expected


def _compress_here(source, output, groups):
    """One rank's part of a run: its error, if any, and how many seconds it took."""
    workers = find_workers()
    assert isinstance(workers, DeepSpeedWorkers)
    checkpoint = SourceCheckpoint(source)
    settings = CompressionSettings(
        groups=groups, keep=0.25, codec="pruned", align="loo", center="joint", layers=[0, 1]
    )
    begun = time.monotonic()
    try:
        Compression(checkpoint, output, settings, workers).run()
    except UserError as error:
        return str(error), time.monotonic() - begun
    return None, time.monotonic() - begun


@pytest.mark.parametrize("ranks", [2, 3, 8])  # eight ranks: more than the five tasks
def test_any_number_of_ranks_writes_what_one_process_does(family_folder, expected, tmp_path, ranks):
    outcomes = run_on_ranks(ranks, _compress_here, family_folder("mixtral"), tmp_path / "c", 2)

    assert [error for error, _ in outcomes] == [None] * ranks
    assert _contents(tmp_path / "c") == expected


def test_failure_of_one_rank_is_every_ranks_and_leaves_nothing(family_folder, tmp_path):
    source = _harmed(family_folder("mixtral"), tmp_path / "source")

    outcomes = run_on_ranks(3, _compress_here, source, tmp_path / "c", 2)

    errors = {error for error, _ in outcomes}
    assert len(errors) == 1
    assert re.search(f"tensor '{re.escape(EXPERT_OF_RANK_1)}' holds NaN", errors.pop())
    assert max(seconds for _, seconds in outcomes) < 30
    assert names_in(tmp_path) == {"source"}


def test_output_that_exists_is_every_ranks_failure(family_folder, tmp_path):
    (tmp_path / "c").mkdir()
    outcomes = run_on_ranks(2, _compress_here, family_folder("mixtral"), tmp_path / "c", 2)
    assert all("exists already" in error for error, _ in outcomes)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"])
def test_process_that_was_started_alone_works_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert isinstance(find_workers(), SingleWorker)


class _Ranks:
    """What every rank would say, as rank 0 hears it: its own value, then the others'."""

    rank, size = 0, 3

    def __init__(self, others):
        self._others = iter(others)

    def gather(self, value):
        return [value, *next(self._others)]


def test_together_returns_everyones_result():
    workers = _Ranks([(None, None), ("b", "c")])
    assert together(workers, lambda: "a") == ["a", "b", "c"]


def test_together_raises_another_ranks_failure():
    with mistake("disk of rank 1"):
        together(_Ranks([("disk of rank 1", None)]), lambda: "a")


def test_together_raises_this_ranks_failure_only_after_telling_the_others():
    told = []

    class Workers(SingleWorker):
        def gather(self, value):
            told.append(value)
            return [value]

    def fail():
        raise UserError("mine")

    with mistake("mine"):
        together(Workers(), fail)
    assert told == ["mine"]


def test_together_lets_what_is_no_mistake_of_the_user_through():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        together(SingleWorker(), fail)
