"""Running a program as one rank, and failing well: one line for invalid input, every rank down.

Entry points are wrapped in `run_entry_point`. This module imports torch, transformers and DeepSpeed
only inside functions: they take seconds, and options are checked before.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from resmoe_dist.errors import UserError

USER_ERROR = 2
# Exit codes of a process that a signal ended, as shells report them.
_SIGNALLED = 128
_BROKEN_PIPE = _SIGNALLED + signal.SIGPIPE
_FAILED_KEY = "resmoe_dist/failed"
# The launchers check their ranks about once a second.
_GRACE_SECONDS = 10
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_INTERRUPT_SECONDS = 2


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its code.

    A UserError becomes one line on standard error and exit code 2; if several ranks fail, only the
    first one prints. SIGINT and SIGTERM raise KeyboardInterrupt in `main`: its text, if any, is
    printed, and the exit code is 130 or 143. Any failure ends this process at once, without
    destructors, which could wait for ranks that wait for this one. The launcher then takes the
    other ranks down.
    """
    seen: list[int] = []
    try:
        with _interrupts_raised(seen):
            code = _run(main)
    except KeyboardInterrupt as interruption:
        if str(interruption):
            print(interruption, file=sys.stderr, flush=True)
        leave(_SIGNALLED + (seen or [signal.SIGINT])[0])
    if _is_joined():
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.exit(code)


def _run(main: Callable[[], int | None]) -> int:
    """Run `main` and return its code; end the process if it fails.

    A signal during this, even while a failure is being reported, raises KeyboardInterrupt.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output closed it (`… | head`); no message can reach it.
        os._exit(_BROKEN_PIPE)
    except UserError as error:
        _fail(f"error: {error}", USER_ERROR)
    except Exception:
        # Ranks that lose a peer fail as well; only the first failure explains anything.
        _fail(f"rank {launched_rank()} failed\n{traceback.format_exc()}", 1)
    return code


def quiet_libraries() -> None:
    """Let libraries log only warnings, and show progress bars only on rank 0's terminal."""
    import deepspeed
    import transformers

    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if launched_rank() or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def launched_rank() -> int:
    """This process's rank as its launcher set it; 0 for a process that was started alone."""
    found = (
        os.environ.get(name)
        for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    )
    return int(next((rank for rank in found if rank), "0"))


def _is_joined() -> bool:
    """Whether this process has joined other ranks through torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _fail(text: str, code: int) -> None:
    """Print to standard error and leave. A rank that is not the first to fail waits first.

    The launcher usually ends it meanwhile: the launcher reports the first exit code that it sees,
    which must be that of the first failure. A rank that is still running after the wait prints and
    leaves too.
    """
    first = launched_rank() == 0
    if _is_joined():
        from torch.distributed.distributed_c10d import _get_default_store

        # Rank 0 hosts the store: if it is gone, rank 0 has already explained why.
        first = False
        with suppress(Exception), _muted_standard_error():
            first = _get_default_store().add(_FAILED_KEY, 1) == 1
    if not first:
        # The launcher's SIGTERM ends this rank without a message.
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(_GRACE_SECONDS)
    print(text, file=sys.stderr, flush=True)
    leave(code)


@contextmanager
def _interrupts_raised(seen: list[int]) -> Iterator[None]:
    """Make the first SIGINT or SIGTERM raise KeyboardInterrupt and append its number to `seen`.

    Later signals do nothing, because the process is already leaving: Ctrl-C reaches ranks directly
    and again through their launcher. If compiled code or an unresponsive rank delays the exception
    for two seconds, the process ends without it. Signals that were ignored stay ignored.
    """

    def note(number: int, frame: FrameType | None) -> None:
        if not seen:
            seen.append(number)
            raise KeyboardInterrupt

    def leave_after_delay() -> None:
        while arrived := os.read(read_end, 1):
            if arrived[0] in INTERRUPTS:
                time.sleep(_INTERRUPT_SECONDS)
                os._exit(_SIGNALLED + arrived[0])
        os.close(read_end)

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=leave_after_delay, daemon=True).start()
    # The wakeup pipe is written at once, even while Python handlers cannot run.
    other_end = signal.set_wakeup_fd(write_end)
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(other_end)
        os.close(write_end)


@contextmanager
def _muted_standard_error() -> Iterator[None]:
    """Discard standard error, C++'s too: c10d logs a lost store with a backtrace."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def leave(code: int) -> NoReturn:
    """End the process at once, without destructors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
