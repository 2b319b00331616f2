"""Every rank watches every other: all end soon after one fails, and one says why.

A thread of each rank holds a connection to each other rank. It sends a sign of life about once a
second, whatever the main thread does. A rank is lost when its connection closes, silent when
nothing has come from it for the time-out. Whoever notices a cause, or fails itself, tells the
others. After a moment, in which causes that belong together arrive, the first rank that still runs
prints the line, and all leave.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from resmoe_dist.errors import UserError
from resmoe_dist.parallel import causes
from resmoe_dist.parallel.causes import Cause, Kind
from resmoe_dist.parallel.launched import LaunchedRank, launch_key
from resmoe_dist.parallel.links import Link
from resmoe_dist.parallel.peers import Peer, Peers
from resmoe_dist.parallel.processes import has_lost_its_command, launchers_above

DEFAULT_TIMEOUT = 30.0
# Causes that arrive within this time belong together.
_SETTLE_SECONDS = 0.3
# How long the kernel may take to say how a process ended.
_ENDING_SECONDS = 0.2
# How long a rank waits for another one to print.
_PRINT_SECONDS = 2.0
# How long a rank that fails waits until all have met: they usually fail alike, and one reports.
_GRACE_SECONDS = 10.0
_TICK_SECONDS = 0.1
# A longer pause of the thread is not held against the peers.
_OWN_PAUSE_SECONDS = 0.5
# Imports can keep a thread from running, so ranks that have not joined yet get more time.
_UNJOINED_FACTOR = 2
_MEETING_SECONDS = 300.0


class Watch:
    """This rank's watch over the others, in a thread that starts at once.

    timeout: seconds after which a silent rank counts as failed.
    """

    def __init__(self, place: LaunchedRank, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.place = place
        self._timeout = timeout
        self._launchers = launchers_above()
        self._orphans = [each.pid for each in self._launchers if has_lost_its_command(each)]
        above = self._launchers[0].pid if self._launchers else 0
        self._peers = Peers(place, f"{above}/{launch_key()}")
        self.joined = self._finished = self._stopped = self._has_met = False
        self._all_finished, self._may_leave = threading.Event(), threading.Event()
        # What the thread knows about the end.
        self._causes: set[Cause] = set()
        self._decide_at = self._print_by = float("inf")
        self._printer: int | None = None
        self._mute: set[int] = set()
        self._signalled = False
        self._signal_line = ""
        self._posted: deque[Callable[[], None]] = deque()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._peers.register(self._woken)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def join(self, timeout: float) -> None:
        """Wait for the ranks of this host; from then on a silent rank has `timeout` seconds.

        A rank that finishes without joining ends all. Raises UserError if a rank does not start.
        """
        self._meet()
        self._timeout = timeout
        self.joined = True

    def _meet(self) -> None:
        deadline = time.monotonic() + _MEETING_SECONDS
        while not self._peers.all_met:
            if time.monotonic() > deadline:
                raise UserError(
                    f"only {len(self._peers.all) + 1} of {self.place.local_size} ranks of this "
                    f"host started within {_MEETING_SECONDS:g} s; start them together"
                )
            time.sleep(_TICK_SECONDS / 2)

    def ranks_here(self) -> set[int]:
        """The ranks of this host, this one included."""
        return {self.place.rank, *self._peers.all}

    def add(self, link: Link) -> None:
        """Watch a rank of another host."""
        self._post(lambda: self._peers.add(link))

    def fail(self, code: int, text: str) -> NoReturn:
        """End all ranks with exit code `code`. One rank prints `text`, or a more likely cause."""
        self._post(lambda: self._notice(Cause(Kind.RAISED, self.place.rank, code, text)))
        time.sleep(_GRACE_SECONDS + 2 * _PRINT_SECONDS)
        leave(code, text)

    def notice_signal(self, code: int) -> None:
        """Tell the others that a signal ends this process with exit code `code`. In any thread."""
        self._post(lambda: self._get_signal(code))

    def leave_after_signal(self, code: int, text: str) -> NoReturn:
        """Leave, unless another rank's failure was the reason: then the thread ends the process.

        text: printed instead of the line that says which rank was ended.
        """
        self._may_leave.wait(_GRACE_SECONDS)
        leave(code, text or self._signal_line)

    def finish(self) -> None:
        """Wait until all ranks have finished. If one fails meanwhile, this process fails too."""
        self._post(self._finish)
        while not self._all_finished.wait(_TICK_SECONDS):
            pass

    def hand_over(self) -> None:
        """Wait until all ranks of this host leave their work to others, then stop watching.

        If one joins instead, all end. Raises UserError if a rank does not start.
        """
        self._meet()
        self.finish()

    def dismiss(self) -> None:
        """Stop watching and being watched."""
        self._post(self._stop)
        self._all_finished.wait(_PRINT_SECONDS)

    def _post(self, action: Callable[[], None]) -> None:
        """Let the thread do something now."""
        self._posted.append(action)
        with suppress(OSError):
            self._wake.send(b".")

    # The thread.

    def _run(self) -> None:
        last = told = time.monotonic()
        while not self._stopped:
            for peer, message in self._peers.wait(_TICK_SECONDS, last):
                self._obey(peer, message)
            with suppress(OSError):
                self._woken.recv(4096)
            now = time.monotonic()
            if self._peers.all_met and not self._has_met:
                self._has_met = True
                self._settle(now)
            if now - last > _OWN_PAUSE_SECONDS:
                for peer in self._peers.all.values():
                    peer.heard += now - last
            last = now
            while self._posted:
                self._posted.popleft()()
            if now - told > min(1.0, self._timeout / 5):
                told = now
                self._peers.tell({"joined": self.joined})
                self._tell_causes()
                self._look_for_launchers()
            self._look_for_peers(now)
            if now >= self._decide_at:
                self._decide(now)

    def _obey(self, peer: Peer, message: dict[str, Any]) -> None:
        """Take in what a peer says."""
        peer.joined = message.get("joined", peer.joined)
        peer.finished = message.get("finished", peer.finished)
        if "cause" in message:
            self._learn(Cause.unpacked(message["cause"]))
        if "printed" in message:
            self._leave(Cause.unpacked(message["printed"]), "")

    def _look_for_launchers(self) -> None:
        if self._orphans and not self._causes:
            self._notice(causes.command_gone(self.place.rank, self._orphans[0]))
        for launcher in self._launchers:
            if not self._causes and not launcher.is_running():
                self._notice(causes.launcher_gone(self.place.rank, launcher.pid))

    def _look_for_peers(self, now: float) -> None:
        """Find ranks that are lost or silent, and whether all have finished."""
        peers = self._peers.all.values()
        for peer in peers:
            known = any(cause.rank == peer.rank for cause in self._causes)
            if peer.finished:
                if self.joined and not peer.joined and not known:
                    self._notice(causes.absent(peer.rank))
                continue
            limit = self._timeout * (1 if peer.joined and self.joined else _UNJOINED_FACTOR)
            if peer.closed is not None and not known:
                ending = peer.process.ending() if peer.process else None
                if ending or not peer.process or now - peer.closed > _ENDING_SECONDS:
                    self._notice(causes.lost(peer.rank, ending))
            elif not known and peer.is_silent(limit, now):
                self._notice(causes.silent(peer.rank, limit))
        if self._finished and all(peer.finished for peer in peers):
            self._stop()

    def _notice(self, cause: Cause) -> None:
        """Take in a cause, and tell the others."""
        self._learn(cause)
        self._peers.tell({"cause": cause.packed()})

    def _learn(self, cause: Cause) -> None:
        self._causes.add(cause)
        wait = _SETTLE_SECONDS
        if cause.rank == self.place.rank and not self._peers.all_met:
            wait = _PRINT_SECONDS if cause.kind is Kind.INTERRUPTED else _GRACE_SECONDS
        self._decide_at = min(self._decide_at, time.monotonic() + wait)

    def _settle(self, now: float) -> None:
        """All have met: those that failed before can now agree on who reports."""
        if self._causes:
            self._decide_at = min(self._decide_at, now + _SETTLE_SECONDS)
            self._tell_causes()

    def _tell_causes(self) -> None:
        for cause in self._causes:  # for ranks that came later
            self._peers.tell({"cause": cause.packed()})

    def _get_signal(self, code: int) -> None:
        if self._signalled:
            return
        self._signalled = True
        self._notice(causes.interrupted(self.place.rank, code, self._missing()))

    def _missing(self) -> list[int]:
        """The ranks of this host that have not been met."""
        first = self.place.rank - self.place.local_rank
        return [
            rank
            for rank in range(first, first + self.place.local_size)
            if rank != self.place.rank and rank not in self._peers.all
        ]

    def _decide(self, now: float) -> None:
        """End this process: for the first of the causes, printed by the first rank that can."""
        cause = min(self._causes)
        if cause.kind is Kind.INTERRUPTED:
            # The main thread has its own way to leave after a signal.
            self._decide_at = float("inf")
            if not self._signalled:
                self._signalled = True
                os.kill(os.getpid(), signal.Signals(cause.code - 128))
            elif cause.rank == self.place.rank:
                self._signal_line = cause.text
            self._may_leave.set()
            return
        able = sorted([self.place.rank, *(peer.rank for peer in self._peers.open())])
        if cause.kind is Kind.RAISED:
            able.sort(key=lambda rank: rank != cause.rank)
        else:
            able = [rank for rank in able if rank != cause.rank]
        if now > self._print_by and self._printer is not None:
            self._mute.add(self._printer)
        printer = next(rank for rank in able if rank not in self._mute)
        if printer == self.place.rank:
            self._leave(cause, cause.text)
        if printer != self._printer:
            self._printer, self._print_by = printer, now + _PRINT_SECONDS

    def _leave(self, cause: Cause, text: str) -> NoReturn:
        """Print, let the others leave too, and end a process that does not respond."""
        silent = self._peers.all.get(cause.rank) if cause.kind is Kind.SILENT else None
        if silent and silent.process:
            silent.process.kill()
        write_line(text)
        self._peers.tell({"printed": cause.packed()})
        os._exit(cause.code)

    def _finish(self) -> None:
        self._finished = True
        self._peers.tell({"joined": self.joined, "finished": True})

    def _stop(self) -> None:
        self._peers.tell({"joined": self.joined, "finished": True})
        self._stopped = True
        self._all_finished.set()


# Where lines go: standard error as it was when the program began.
_stderr = [2]


def keep_stderr() -> None:
    """Let lines go to what standard error is now, also if a library redirects it for a while.

    DeepSpeed does so while it is imported and tries a compiler.
    """
    with suppress(OSError):
        _stderr[:] = [os.dup(2)]


def write_line(text: str) -> None:
    """Write to standard error, unless there is nothing to write or no one to read it."""
    if text:
        with suppress(OSError):
            os.write(_stderr[0], f"{text}\n".encode())


def leave(code: int, text: str) -> NoReturn:
    """Write a line and end the process at once, without destructors."""
    write_line(text)
    os._exit(code)


_current: list[Watch] = []


def start_watch(place: LaunchedRank) -> Watch:
    """Start this process's watch. There is one at most."""
    _current[:] = [Watch(place)]
    return _current[0]


def current_watch() -> Watch | None:
    """This process's watch; None if no launcher started it, or it does not run an entry point."""
    return _current[0] if _current else None
