"""Connections between the watches of ranks on different hosts."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import time
from typing import Any

import torch

from resmoe_dist.parallel.links import Link
from resmoe_dist.parallel.watch import Watch

logger = logging.getLogger(__name__)
_CONNECT_SECONDS = 30.0
_TOKEN_BYTES = 32


def connect_hosts(watch: Watch) -> None:
    """Let a rank watch those of other hosts too. Collective over the world, which has joined.

    Each rank connects to those below it. A rank that cannot be reached is not watched, and a
    warning says so.
    """
    local = watch.ranks_here()
    with socket.create_server(("", 0), backlog=4096) as listener:
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        ours = (sorted(local), _own_address(), listener.getsockname()[1], token)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, ours)
        for rank in range(watch.place.rank):
            _, address, port, theirs = everyone[rank]
            if rank in local:
                continue
            try:
                connection = socket.create_connection((address, port), _CONNECT_SECONDS)
                connection.sendall(theirs.encode())
            except OSError as error:
                logger.warning("rank %d at %s:%d is not watched: %s", rank, address, port, error)
                continue
            watch.add(Link(connection))
        waiting = [rank for rank in range(watch.place.rank + 1, len(everyone)) if rank not in local]
        _accept(watch, listener, token, len(waiting))


def _accept(watch: Watch, listener: socket.socket, token: str, count: int) -> None:
    """Watch `count` ranks that connect with our token."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while count:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
            connection.settimeout(_CONNECT_SECONDS / 6)
            given = connection.recv(_TOKEN_BYTES, socket.MSG_WAITALL)
        except OSError as error:
            logger.warning("%d ranks of other hosts are not watched: %s", count, error)
            return
        if hmac.compare_digest(given, token.encode()):
            watch.add(Link(connection))
            count -= 1
        else:
            connection.close()


def _own_address() -> str:
    """This host's address, as seen from the host of rank 0."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, *_, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # nothing is sent
        own = probe.getsockname()[0]
    # On the host of rank 0 itself, its name may stand for a loopback address.
    return master if own.startswith("127.") or own == "::1" else own
