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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from resmoe_dist.parallel.affinity import widen_affinity
from resmoe_dist.parallel.failures import describe, exit_code, may_be_lost_peer
from resmoe_dist.parallel.launched import launched
from resmoe_dist.parallel.watch import Watch, keep_stderr, start_watch, write_line

# Exit codes of a process that a signal ended, as shells report them.
_SIGNALLED = 128
_BROKEN_PIPE = _SIGNALLED + signal.SIGPIPE
# A rank that lost its peer learns from its watch what happened within this time.
_LOST_PEER_SECONDS = 5
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_INTERRUPT_SECONDS = 2


def run_entry_point(main: Callable[[], int | None], *, alone: bool = False) -> None:
    """Run a script's `main` and exit with its code.

    alone: this command is a single process, whatever launcher's variables it finds.

    A UserError becomes one line on standard error and exit code 2. SIGINT and SIGTERM raise
    KeyboardInterrupt in `main`: its text, if any, is printed, and the exit code is 130 or 143. Any
    failure ends this process at once, without destructors, which could wait for ranks that wait
    for this one.

    A rank of a launch watches the others (`watch`): if one fails, all end, and one line is printed.
    """
    seen: list[int] = []
    keep_stderr()
    place = None if alone else launched()
    if place is not None:
        widen_affinity(place)
    watch = start_watch(place) if place is not None else None
    # What follows a signal happens inside as well: here, launchers' second signals do nothing.
    with _interrupts_raised(seen, watch):
        try:
            code = _run(main, watch)
        except KeyboardInterrupt as interruption:
            end = _SIGNALLED + (seen or [signal.SIGINT])[0]
            with suppress(OSError):
                sys.stdout.flush()
            if watch is not None:
                watch.leave_after_signal(end, str(interruption))
            write_line(str(interruption))
            leave(end)
    sys.exit(code)


def _run(main: Callable[[], int | None], watch: Watch | None) -> int:
    """Run `main` and return its code when all ranks are done; end the process if one fails.

    A signal during this, even while a failure is being reported, raises KeyboardInterrupt.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output closed it (`… | head`); no message can reach it.
        _fail(_BROKEN_PIPE, "", watch)
    except SystemExit as left:
        if left.code and watch is not None:
            _fail(left.code if isinstance(left.code, int) else 1, "", watch)
        if watch is not None:
            watch.dismiss()
        raise
    except Exception as error:
        if watch is not None and may_be_lost_peer(error):
            # The watch says which one, and ends this process.
            time.sleep(_LOST_PEER_SECONDS)
        if watch is None or watch.place.world == 1:
            text = describe(error)
        else:
            text = describe(error, watch.place.rank, joined=watch.joined)
        _fail(exit_code(error), text, watch)
    if watch is not None:
        watch.finish()
    if _is_joined():
        import torch

        with suppress(Exception):
            torch.distributed.destroy_process_group()
    return code


def _fail(code: int, text: str, watch: Watch | None) -> NoReturn:
    """Print and end this process, and with it all other ranks."""
    if watch is not None:
        watch.fail(code, text)
    write_line(text)
    leave(code)


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
    place = launched()
    return place.rank if place is not None else 0


def _is_joined() -> bool:
    """Whether this process has joined other ranks through torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


@contextmanager
def _interrupts_raised(seen: list[int], watch: Watch | None) -> Iterator[None]:
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
                code = _SIGNALLED + arrived[0]
                if watch is not None:
                    watch.notice_signal(code)
                time.sleep(_INTERRUPT_SECONDS)
                if watch is not None:
                    watch.leave_after_signal(code, "")
                os._exit(code)
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


def leave(code: int) -> NoReturn:
    """End the process at once, without destructors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
