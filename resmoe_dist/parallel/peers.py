"""The other ranks of a launch, as one rank's watch sees them."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from resmoe_dist.parallel.launched import LaunchedRank
from resmoe_dist.parallel.links import Link, LocalMeeting
from resmoe_dist.parallel.processes import ProcessId, this_process


@dataclass(eq=False)
class Peer:
    """Another rank.

    process: None on another host. heard: when its last message came, in seconds of the monotonic
    clock. ticks: its processor time at some moment since then. joined: it has joined the grid.
    finished: it has nothing left to do. closed: when its connection closed.
    """

    rank: int
    link: Link
    process: ProcessId | None
    heard: float
    ticks: int | None = None
    joined: bool = False
    finished: bool = False
    closed: float | None = None

    def is_silent(self, seconds: float, now: float) -> bool:
        """Whether nothing has come from it for `seconds`.

        A process of this host that computes is not silent: one long call of a library can keep its
        thread from running.
        """
        if self.process is not None and now - self.heard > seconds / 2:
            ticks = self.process.cpu_ticks()
            if self.ticks is None:
                self.ticks = ticks
            elif now - self.heard > seconds and ticks > self.ticks:
                self.ticks, self.heard = ticks, now - seconds / 2
        return now - self.heard > seconds


class Peers:
    """Finds the ranks of this host, and exchanges messages with them and with those added."""

    def __init__(self, place: LaunchedRank, key: str) -> None:
        self.all: dict[int, Peer] = {}
        self.all_met = place.local_size == 1
        self._place = place
        self._process = this_process()
        self._meeting = LocalMeeting(key, place.local_rank)
        self._unnamed: set[Link] = set()
        self._selector = selectors.DefaultSelector()

    def register(self, wake: socket.socket) -> None:
        """Let `wait` return when something arrives at `wake`, which the caller reads."""
        self._selector.register(wake, selectors.EVENT_READ)

    def wait(self, seconds: float, now: float) -> Iterator[tuple[Peer, dict[str, Any]]]:
        """The messages that arrive within `seconds`. Meets the ranks of this host meanwhile."""
        if not self.all_met:
            self._meet()
        for key, _ in self._selector.select(seconds):
            link = key.fileobj
            if not isinstance(link, Link):
                continue
            messages, closed = link.receive()
            if messages and link in self._unnamed:
                self._name(link, messages.pop(0), now)
            peer = next((peer for peer in self.all.values() if peer.link is link), None)
            if closed:
                self._selector.unregister(link)
                self._unnamed.discard(link)
                link.close()
            if peer is not None:
                peer.heard, peer.ticks = now, None
                for message in messages:
                    yield peer, message
                if closed:
                    peer.closed = now

    def add(self, link: Link) -> None:
        """Start a conversation: each side says who it is."""
        self._unnamed.add(link)
        self._selector.register(link, selectors.EVENT_READ)
        process = self._process
        link.send({"rank": self._place.rank, "pid": process.pid, "started": process.started})

    def open(self) -> list[Peer]:
        """The peers that can be reached, by rank."""
        return [self.all[rank] for rank in sorted(self.all) if self.all[rank].closed is None]

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all peers."""
        for peer in self.open():
            peer.link.send(message)

    def _meet(self) -> None:
        """Connect to the ranks of this host, as far as they run."""
        if self._meeting.listener is None and (listener := self._meeting.listen()):
            self._selector.register(listener, selectors.EVENT_READ)
        for link in [*self._meeting.connect(), *self._meeting.accept()]:
            self.add(link)

    def _name(self, link: Link, message: dict[str, Any], now: float) -> None:
        """A peer has said who it is."""
        local = link.socket.family == socket.AF_UNIX
        process = ProcessId(message["pid"], message["started"]) if local else None
        self._unnamed.discard(link)
        self.all[message["rank"]] = Peer(message["rank"], link, process, now)
        met = sum(peer.process is not None for peer in self.all.values())
        self.all_met = met >= self._place.local_size - 1
