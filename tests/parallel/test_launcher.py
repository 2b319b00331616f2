"""Joining, starting and refusing grids, without processes."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import deepspeed
import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.parallel import launcher
from resmoe_dist.parallel.topology import SINGLE_PROCESS
from tests.ranks import run_on_ranks


class _Accelerator:
    def __init__(self, name: str) -> None:
        self._name = name

    def device_name(self) -> str:
        return self._name


@pytest.fixture
def machine(monkeypatch):
    """machine(device, world): what `start_grid` finds."""

    def pretend(device: str, world: int) -> None:
        monkeypatch.setattr(launcher, "get_accelerator", lambda: _Accelerator(device))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")

    return pretend


def test_a_wrong_number_of_gpu_ranks_is_refused_with_the_right_command(machine):
    machine("cuda", 3)

    with pytest.raises(UserError, match=r"needs 8 ranks .* 3 were .* deepspeed --num_gpus 8"):
        launcher.start_grid(4, 2, ["launch/infer.py"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_wrong_number_of_mpi_ranks_is_refused_with_the_right_command(
    machine, monkeypatch, device
):
    machine(device, 3)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")

    with pytest.raises(UserError, match=r"3 were started; run mpirun -n 8 python -m a\.b …"):
        launcher.start_grid(4, 2, ["--module", "a.b"])


def test_a_single_gpu_is_refused_a_larger_grid(machine):
    machine("cuda", 1)

    with pytest.raises(UserError, match="1 were started"):
        launcher.start_grid(2, 1, ["launch/infer.py"])


def test_one_process_alone_needs_no_process_group(machine):
    machine("cpu", 1)

    assert launcher.start_grid(1, 1, ["launch/infer.py"]) == SINGLE_PROCESS


@pytest.mark.parametrize("start", [["launch/infer.py"], ["--module", "resmoe_dist.launch.infer"]])
def test_on_a_cpu_the_deepspeed_launcher_replaces_the_process(machine, monkeypatch, start):
    machine("cpu", 1)
    replaced = []
    monkeypatch.setattr(launcher.os, "execve", lambda *call: replaced.append(call))
    program = [*start, "--ep", "4", "--tp", "2"]

    with pytest.raises(UserError):  # execve does not return; here it did
        launcher.start_grid(4, 2, program)

    ((_, command, environment),) = replaced
    assert "deepspeed.launcher.launch" in command
    assert command[-len(program) :] == program
    assert "WORLD_SIZE" not in environment


def test_a_module_on_gpus_is_refused_with_the_command_for_modules(machine):
    machine("cuda", 3)

    with pytest.raises(UserError, match=r"--num_gpus 8 --module resmoe_dist\.launch\.infer …"):
        launcher.start_grid(4, 2, ["--module", "resmoe_dist.launch.infer", "--ep", "4"])


@pytest.mark.parametrize(
    ("spec", "start"),
    [
        (None, ["launch/infer.py"]),
        (ModuleSpec("resmoe_dist.launch.infer", None), ["--module", "resmoe_dist.launch.infer"]),
    ],
)
def test_a_program_is_started_again_as_it_was_started(monkeypatch, spec, start):
    main = ModuleType("__main__")
    main.__spec__ = spec
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["launch/infer.py", "--local_rank=0", "--ep", "2"])

    assert launcher.this_program() == [*start, "--local_rank=0", "--ep", "2"]


def test_ranks_that_were_started_for_another_grid_do_not_start_more(machine, monkeypatch):
    machine("cpu", 2)
    monkeypatch.setenv(launcher.STARTED_BY_US, "4")

    with pytest.raises(UserError, match="started 4 ranks, found 2"):
        launcher.start_grid(4, 1, ["launch/infer.py"])


@pytest.mark.parametrize(("ep", "tp"), [(0, 1), (1, 0), (-2, 1)])
def test_a_grid_has_at_least_one_rank_each_way(machine, ep, tp):
    machine("cpu", 1)

    with pytest.raises(UserError, match="must be 1 or more"):
        launcher.start_grid(ep, tp, ["launch/infer.py"])


def _operators() -> dict[str, bool]:
    return dict(deepspeed.ops.__compatible_ops__)


def test_ranks_join_without_running_compilers():
    # DeepSpeed's own table has an entry for each operator that it tried to compile a program for.
    assert run_on_ranks(2, _operators) == 2 * [{"deepspeed_shm_comm": False}]


def test_a_table_of_operators_that_deepspeed_made_is_kept(monkeypatch):
    found = {"cpu_adam": True, "deepspeed_shm_comm": True}
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", found, raising=False)

    launcher.leave_out_shared_memory()

    assert deepspeed.ops.__compatible_ops__ == {"cpu_adam": True, "deepspeed_shm_comm": False}
