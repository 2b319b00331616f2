"""How a process ends: signals, mistakes, and failures of one of several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from resmoe_dist.parallel import entry_point
from tests.imports import imported_by

# What a process does until a signal comes: it waits in Python, or in code that no signal ends.
WAITS = {
    "python": "time.sleep(30)",
    "compiled code": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}); "
        "ctypes.CDLL(None).usleep(30_000_000)"
    ),
}


def _start(body, *, ignored=False, rank=None):
    """A process that runs `body` as an entry point. Returns when the body runs."""
    script = (
        "import ctypes, signal, time\n"
        "from resmoe_dist.parallel.entry_point import run_entry_point\n"
        f"def main():\n    print('begun', flush=True)\n    {body}\n"
        "run_entry_point(main)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | ({} if rank is None else {"RANK": str(rank), "WORLD_SIZE": "2"}),
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("wait", WAITS)
def test_a_signal_ends_a_process_within_seconds_and_without_output(wait, number, code):
    process = _start(WAITS[wait])
    begun = time.monotonic()
    process.send_signal(number)
    # Launchers often send a second signal to a rank that is leaving.
    # Of two signals that are pending together, the process would see the second one first.
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == code
    assert time.monotonic() - begun < 5


@pytest.mark.slow
def test_the_text_of_an_interruption_is_printed():
    process = _start(
        "try: time.sleep(30)\n    except KeyboardInterrupt: raise KeyboardInterrupt('stopped at 7')"
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "stopped at 7\n")
    assert process.returncode == 143


@pytest.mark.slow
def test_a_signal_while_a_failure_is_reported_ends_the_process_without_a_traceback():
    # A rank that lost its peer is formatting the traceback when the launcher ends it.
    body = (
        "import traceback; "
        "traceback.format_exc = lambda: time.sleep(30); "
        "raise ValueError('lost a peer')"
    )
    process = _start(body)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 143


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored():
    process = _start("time.sleep(1); return 7", ignored=True)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 7


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in entry_point.INTERRUPTS]
    with pytest.raises(SystemExit):
        entry_point.run_entry_point(lambda: 0)
    assert [signal.getsignal(number) for number in entry_point.INTERRUPTS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_invalid_input_of_one_process_is_one_line_and_exit_code_2():
    process = _start(
        "from resmoe_dist.errors import UserError\n    raise UserError('no such folder')"
    )

    assert process.communicate(timeout=30) == ("", "error: no such folder\n")
    assert process.returncode == 2


def test_a_line_is_seen_while_a_library_redirects_standard_error():
    body = """
    import os
    from resmoe_dist.errors import UserError
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise UserError("no such folder")
    """

    process = _start(body)

    assert process.communicate(timeout=60)[1] == "error: no such folder\n"
    assert process.returncode == 2


def test_only_rank_0_reports_invalid_input_at_once():
    body = "from resmoe_dist.errors import UserError\n    raise UserError('no such folder')"
    ranks = [_start(body, rank=rank) for rank in range(2)]

    assert ranks[0].communicate(timeout=30) == ("", "error: no such folder\n")
    # What a launcher does with the others when the first one has failed.
    ranks[1].terminate()
    assert ranks[1].communicate(timeout=30) == ("", "")


def test_entry_points_import_no_heavy_library():
    assert imported_by("import resmoe_dist.parallel.entry_point")[0] == []
