"""Clusters of experts: planted ones are found, and the order of neurons means nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression import clustering
from resmoe_dist.compression.clustering import cluster_experts

seeds = st.integers(0, 2**32 - 1)


def _planted(
    labels: list[int], noise: float, *, rows: int = 20, columns: int = 12, seed: int = 0
) -> list[Tensor]:
    """Noisy copies of one base per label, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(max(labels) + 1, rows, columns, generator=generator)
    return [
        bases[label][torch.randperm(rows, generator=generator)]
        + noise * torch.randn(rows, columns, generator=generator)
        for label in labels
    ]


def _lists(labels: list[int]) -> list[list[int]]:
    """The clusters that labels stand for, by their first expert."""
    return sorted([k for k, own in enumerate(labels) if own == label] for label in set(labels))


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 0, 1, 0, 1], [0, 0, 0, 1], [2, 1, 0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 0, 1, 2, 3]],
)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_planted_clusters_are_found(labels, noise):
    found = cluster_experts(_planted(labels, noise), max(labels) + 1)

    assert found == _lists(labels)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_weights_does_not_matter(scale):
    labels = [0, 1, 0, 1, 2]

    found = cluster_experts([scale * expert for expert in _planted(labels, 0.1)], 3)

    assert found == _lists(labels)


def test_experts_of_any_dtype_are_clustered():
    labels = [0, 1, 1, 0, 1]

    found = cluster_experts([expert.bfloat16() for expert in _planted(labels, 0.1)], 2)

    assert found == _lists(labels)


@given(count=st.integers(1, 9), data=st.data(), seed=seeds)
@settings(deadline=None)
def test_every_expert_is_in_one_of_exactly_as_many_clusters_as_asked_for(count, data, seed):
    # Few labels and no noise: many experts are equal, and many distances.
    labels = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    noise = data.draw(st.sampled_from([0.0, 0.1]))
    clusters = data.draw(st.integers(1, count))

    found = cluster_experts(_planted(labels, noise, rows=5, columns=3, seed=seed), clusters)

    assert len(found) == clusters
    assert all(found)
    assert sorted(k for cluster in found for k in cluster) == list(range(count))
    assert found == sorted(sorted(cluster) for cluster in found)


@pytest.mark.parametrize("expert", [torch.zeros(6, 4), torch.ones(6, 4)], ids=["zeros", "ones"])
@pytest.mark.parametrize("clusters", [1, 2, 4, 7])
def test_equal_experts_are_split_all_the_same(expert, clusters):
    found = cluster_experts([expert] * 7, clusters)

    assert len(found) == clusters
    assert sorted(k for cluster in found for k in cluster) == list(range(7))


@given(seed=seeds, clusters=st.integers(2, 5))
@settings(deadline=None, max_examples=40)
def test_the_order_of_the_rows_does_not_matter(seed, clusters):
    generator = torch.Generator().manual_seed(seed)
    experts = list(torch.randn(6, 15, 10, generator=generator))
    shuffled = [expert[torch.randperm(15, generator=generator)] for expert in experts]

    assert cluster_experts(shuffled, clusters) == cluster_experts(experts, clusters)


@pytest.mark.parametrize(("block_rows", "columns"), [(1, 512), (7, 512), (2048, 5)])
def test_blocks_of_rows_and_a_sketch_of_the_columns_find_the_same(monkeypatch, block_rows, columns):
    labels = [0, 1, 2, 1, 0, 2, 2]
    experts = _planted(labels, 0.2, columns=40)
    monkeypatch.setattr(clustering, "_BLOCK_ROWS", block_rows)
    monkeypatch.setattr(clustering, "_COLUMNS", columns)

    assert cluster_experts(experts, 3) == _lists(labels)


def test_experts_may_come_one_at_a_time():
    labels = [0, 1, 0, 1]
    experts = _planted(labels, 0.1)

    assert cluster_experts((expert for expert in experts), 2) == _lists(labels)


def test_clustering_does_not_change_the_experts():
    experts = _planted([0, 1, 0], 0.1)
    before = [expert.clone() for expert in experts]

    cluster_experts(experts, 2)

    assert all(torch.equal(*pair) for pair in zip(experts, before, strict=True))
