"""How long a collective takes on a link: a model of latency and bandwidth (alpha and beta).

    seconds = base + per_peer · peers + bytes sent / bandwidth

for a collective in which a rank has `peers` others and sends so many bytes to them. A collective
over several nodes takes the latency of the slower of its two links, and the longer of the two
times for the bytes that stay inside the node and those that leave it.

The presets' bandwidths are the hardware's, in one direction, for one GPU. Their latencies are
assumptions, of the size that NCCL shows for small messages. Replace them if you have measured
yours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.wire import Message
from resmoe_dist.parallel.collectives import exchange

# Bytes that a rank sends in the collectives that are timed.
_TIMED_BYTES = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22)
_TIMED_CALLS = 20


@dataclass(frozen=True)
class Link:
    """base, per_peer: seconds. bandwidth: bytes per second that a rank sends. origin: in words."""

    name: str
    base: float
    per_peer: float
    bandwidth: float
    origin: str

    def latency(self, peers: int) -> float:
        """Seconds of a collective that sends nothing."""
        return self.base + self.per_peer * peers


PRESETS = {
    link.name: link
    for link in (
        Link("nvlink", 12e-6, 0.5e-6, 450e9, "NVLink 4 (H100)"),
        Link("pcie", 20e-6, 1e-6, 32e9, "PCIe 4 x16"),
        Link("ib200", 25e-6, 1e-6, 25e9, "InfiniBand, 200 Gbit/s per GPU"),
    )
}


@dataclass(frozen=True)
class Network:
    """link: between the ranks of a node. between: nodes. per_node: ranks of a node."""

    link: Link
    between: Link
    per_node: int

    def seconds(self, message: Message) -> float:
        """Of one collective, as its first rank sees it."""
        peers = len(message.ranks) - 1
        if not peers:
            return 0.0
        nodes = [rank // self.per_node for rank in message.ranks]
        inside = nodes.count(nodes[0]) - 1
        stays = message.bytes * inside / peers / self.link.bandwidth
        leaves = message.bytes * (peers - inside) / peers / self.between.bandwidth
        latency = self.link.latency(peers)
        if inside < peers:
            latency = max(latency, self.between.latency(peers))
        return latency + max(stays, leaves)


class Timing(NamedTuple):
    """A measured collective: other ranks of the group, bytes that each rank sent, seconds."""

    peers: int
    sent: float
    seconds: float


def fit_link(name: str, timings: Sequence[Timing], origin: str) -> Link:
    """The link that explains timings best: the least sum of squared relative errors."""
    peers, sent, seconds = (np.array(column, dtype=float) for column in zip(*timings, strict=True))
    terms = np.stack([np.ones_like(peers), peers, sent], 1) / seconds[:, None]
    base, per_peer, per_byte = nnls(terms, np.ones_like(seconds))[0]
    return Link(name, base, per_peer, 1 / per_byte if per_byte else float("inf"), origin)


def time_collectives() -> list[Timing]:
    """All-to-alls of all ranks, in which all gloo traffic of the runtime goes. Collective."""
    world = torch.distributed.group.WORLD
    assert world is not None
    ranks, found = torch.distributed.get_world_size(), []
    for size in _TIMED_BYTES:
        part = max(1, size // (ranks - 1))
        rows = torch.zeros(ranks, part, dtype=torch.uint8)
        seconds = []
        for _ in range(_TIMED_CALLS):
            began = time.perf_counter()
            exchange(rows, world)
            seconds.append(time.perf_counter() - began)
        found.append(Timing(ranks - 1, part * (ranks - 1), float(np.median(seconds))))
    return found
