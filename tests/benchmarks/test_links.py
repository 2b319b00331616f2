"""The model of a link, by arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.links import Link, Network, Timing, fit_link
from benchmarks.wire import Message

NEAR = Link("near", base=10e-6, per_peer=2e-6, bandwidth=1e9, origin="test")
FAR = Link("far", base=30e-6, per_peer=3e-6, bandwidth=1e8, origin="test")


def test_a_fit_finds_the_link_behind_exact_timings():
    timings = [
        Timing(peers, sent, NEAR.latency(peers) + sent / NEAR.bandwidth)
        for peers in (1, 3, 7)
        for sent in (1e3, 1e5, 1e6)
    ]

    found = fit_link("found", timings, "test")

    assert found.base == pytest.approx(NEAR.base, rel=1e-6)
    assert found.per_peer == pytest.approx(NEAR.per_peer, rel=1e-6)
    assert found.bandwidth == pytest.approx(NEAR.bandwidth, rel=1e-6)


def test_inside_a_node_only_its_link_counts():
    network = Network(NEAR, FAR, per_node=4)
    # Three peers, 3000 bytes at 1 GB/s.
    assert network.seconds(Message("x", (4, 5, 6, 7), 3000)) == pytest.approx(16e-6 + 3e-6)


def test_between_nodes_latency_is_the_slower_and_the_longer_transfer_counts():
    network = Network(NEAR, FAR, per_node=2)
    # One peer is in the node of rank 0, two are outside: 2000 of 3000 bytes at 100 MB/s.
    assert network.seconds(Message("x", (0, 1, 2, 3), 3000)) == pytest.approx(39e-6 + 20e-6)
    # If the link between nodes is fast, the third that stays inside takes longer.
    fast = Link("fast", 0, 0, 1e12, "test")
    inside = Network(NEAR, fast, per_node=2).seconds(Message("x", (0, 1, 2, 3), 3000))
    assert inside == pytest.approx(16e-6 + 1e-6)


def test_a_group_of_one_rank_takes_no_time():
    assert Network(NEAR, FAR, 2).seconds(Message("x", (3,), 100)) == 0
