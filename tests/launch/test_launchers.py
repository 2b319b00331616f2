"""launch/infer.py under other launchers than `deepspeed`, and on two hosts: the same text."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.parallel.rendezvous import free_port
from resmoe_dist.parallel.topology import SINGLE_PROCESS
from resmoe_dist.runtime.generation import GenerationOptions, generate_on_lane
from resmoe_dist.runtime.loading import load_model
from tests.jobs.runs import end_command, finish_command, start_command, wait_until
from tests.launch.commands import own_lines, run

pytestmark = pytest.mark.slow

PROMPTS = ["def __init__(self", "import os\n", "class Error"]
SAMPLING = ("--max-new-tokens", "8", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5")
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_JOB_ID": "7",
}


@pytest.fixture(scope="module")
def expected(compressed) -> list[str]:
    """The completions by one process, sampled."""
    options = GenerationOptions(8, temperature=0.8, top_p=0.9, seed=5)
    model, tokenizer = load_model(compressed), load_tokenizer(compressed)
    output = generate_on_lane(model, tokenizer, PROMPTS, SINGLE_PROCESS, options)
    return list(output.completions.values())


@pytest.fixture
def infer(compressed, tmp_path):
    """The script with its options: two prompts' batches per lane, on two lanes."""
    (tmp_path / "prompts").write_text("".join(f"{prompt.rstrip()}\n" for prompt in PROMPTS))
    return (
        *("launch/infer.py", "--ep", "2", "--model", compressed, *SAMPLING, "--batch-size", "1"),
        *("--lanes", "2"),
        *("--json", tmp_path / "r.json"),
        *(option for prompt in PROMPTS for option in ("--prompt", prompt)),
    )


def assert_result(file: Path, expected: list[str]) -> None:
    """Two ranks, one lane each, and the text of one process."""
    result = json.loads(file.read_text())
    assert [(rank["lane"], rank["tp_rank"]) for rank in result["ranks"]] == [(0, 0), (1, 0)]
    assert [each["completion"] for each in result["completions"]] == expected


@pytest.mark.parametrize(
    "launcher",
    [
        ("mpirun", "-n", "2", "python"),
        ("torchrun", "--nproc_per_node", "2", "--master_port", "{port}"),
    ],
    ids=["mpirun", "torchrun"],
)
def test_ranks_that_were_started_join(launcher, infer, expected, tmp_path):
    launcher = [part.format(port=free_port()) for part in launcher]

    code, _, err = run(*launcher, *infer)

    assert code == 0, err
    assert "starting" not in err
    assert_result(tmp_path / "r.json", expected)


def test_ranks_of_srun_join_without_mpi(infer, expected, tmp_path, monkeypatch):
    processes = []
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        monkeypatch.setenv("SLURM_LOCALID", rank)
        processes.append(start_command("python", *infer))

    outcomes = [finish_command(process) for process in processes]

    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert_result(tmp_path / "r.json", expected)


def test_a_wrong_number_of_mpi_ranks_is_refused(compressed):
    code, _, err = run(
        *("mpirun", "-n", "3", "python", "launch/infer.py", "--ep", "2", "--model", compressed),
    )

    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "needs 2 ranks or a multiple, 3 were started; run mpirun -n 2 python launch/" in line


def test_ranks_with_different_options_are_refused(compressed):
    options = ("launch/infer.py", "--ep", "2", "--model", compressed, "--prompt", "import")
    code, _, err = run(
        *("mpirun", "-n", "1", "python", *options, "--seed", "1", ":"),
        *("-n", "1", "python", *options, "--seed", "2"),
    )

    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: rank 1 disagrees with rank 0: --seed is 2 on rank 1, 1 on rank 0; start all ranks "
        "alike"
    ]
    assert "Traceback" not in err


# Two hosts: two launchers on loopback addresses that start one rank each.


def _start_two_hosts(tmp_path: Path, *script: object) -> list[subprocess.Popen[str]]:
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    port = free_port()
    return [
        start_command(
            *("deepspeed", "--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", node),
            *("--master_addr", "127.0.0.1", "--master_port", port, *script),
        )
        for node in (0, 1)
    ]


def test_two_hosts_give_the_text_of_one_process(infer, expected, tmp_path):
    outcomes = [finish_command(process) for process in _start_two_hosts(tmp_path, *infer)]

    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert_result(tmp_path / "r.json", expected)


def test_a_killed_rank_ends_those_of_other_hosts(compressed, tmp_path):
    hosts = _start_two_hosts(
        tmp_path,
        *("launch/infer.py", "--ep", "2", "--model", compressed, "--prompt", "import"),
        *("--max-new-tokens", "900"),
    )
    try:
        wait_until(lambda: _rank_of(hosts[1]) and _joined(_rank_of(hosts[1])))
        time.sleep(2)
        _rank_of(hosts[1]).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        printed = [host.communicate(timeout=60)[1] for host in hosts]
        assert time.monotonic() - killed < 20
    finally:
        for host in hosts:
            end_command(host)

    assert all(host.returncode for host in hosts)
    lines = [line for err in printed for line in own_lines(err) if line.startswith("error: ")]
    assert lines == ["error: rank 1 ended without a message"]
    assert not any("Traceback" in err for err in printed)


def _rank_of(host: subprocess.Popen[str]) -> psutil.Process | None:
    children = psutil.Process(host.pid).children(recursive=True)
    return next((child for child in children if "launch/infer.py" in child.cmdline()[:3]), None)


def _joined(rank: psutil.Process) -> bool:
    """Whether a rank has connections to the other host: of the store, of gloo, of the watch."""
    return sum(each.status == psutil.CONN_ESTABLISHED for each in rank.net_connections()) >= 3
