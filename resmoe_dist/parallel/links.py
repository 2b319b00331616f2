"""Connections between the ranks of a launch, on which they tell each other that they are alive.

The ranks of one host find each other by the names of Unix sockets, as soon as they run; ranks on
different hosts connect over TCP once they have joined. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
from typing import Any

# More than a peer that reads can have outstanding.
_MOST_UNSENT = 1 << 16


class Link:
    """A connected stream socket to another rank. Never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._incoming = b""
        self._outgoing = b""

    def fileno(self) -> int:
        """For selectors."""
        return self.socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or as much as the peer takes now. A peer that is gone gets nothing."""
        if len(self._outgoing) < _MOST_UNSENT:
            self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages."""
        with contextlib.suppress(OSError):
            while self._outgoing:
                self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have arrived, and whether the peer has closed the connection."""
        closed = False
        try:
            while not closed:
                data = self.socket.recv(_MOST_UNSENT)
                closed = not data
                self._incoming += data
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, self._incoming = self._incoming.split(b"\n")
        return [json.loads(line) for line in lines], closed

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


class LocalMeeting:
    """Where the ranks of one launch on one host meet: each connects to those below it.

    key: the same for all of them, and for no other launch on this host.
    """

    def __init__(self, key: str, local_rank: int) -> None:
        self._key = key
        self._local_rank = local_rank
        self._missing = set(range(local_rank))
        self.listener: socket.socket | None = None

    def listen(self) -> socket.socket | None:
        """The socket on which higher ranks connect; None if a process that ends still has it."""
        if self.listener is None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(self._name(self._local_rank))
            except OSError:
                listener.close()
                return None
            listener.listen(4096)
            listener.setblocking(False)
            self.listener = listener
        return self.listener

    def connect(self) -> list[Link]:
        """Links to lower ranks that have not been connected yet and can be now."""
        made = []
        for lower in sorted(self._missing):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                connection.connect(self._name(lower))
                trusted = _user_of(connection) == os.getuid()
            except OSError:
                trusted = False
            if not trusted:
                connection.close()
                continue
            self._missing.discard(lower)
            made.append(Link(connection))
        return made

    def accept(self) -> list[Link]:
        """Links to higher ranks that have connected. Processes of other users are turned away."""
        made = []
        with contextlib.suppress(OSError):
            while self.listener is not None:
                connection, _ = self.listener.accept()
                if _user_of(connection) == os.getuid():
                    made.append(Link(connection))
                else:
                    connection.close()
        return made

    def _name(self, local_rank: int) -> str:
        # A leading zero: a name that is no file, gone with the process.
        # Hashed, because such a name has 107 bytes at most.
        key = hashlib.sha256(self._key.encode()).hexdigest()[:32]
        return f"\0resmoe-dist/{os.getuid()}/{key}/{local_rank}"


def _user_of(connection: socket.socket) -> int:
    """User id of the process at the other end."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    return struct.unpack("3i", credentials)[1]
