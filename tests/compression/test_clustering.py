"""Clustering finds planted clusters and does not depend on the order of neurons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression.clustering import cluster_experts

seeds = st.integers(0, 2**32 - 1)


def _planted(
    labels: list[int], noise: float, *, rows: int = 20, columns: int = 12, seed: int = 0
) -> list[Tensor]:
    """Noisy copies of one matrix per label, each with its rows in random order."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(max(labels) + 1, rows, columns, generator=generator)
    return [
        bases[label][torch.randperm(rows, generator=generator)]
        + noise * torch.randn(rows, columns, generator=generator)
        for label in labels
    ]


def _lists(labels: list[int]) -> list[list[int]]:
    """Convert the label of each expert to lists of experts, ordered by their first expert."""
    return sorted([k for k, other in enumerate(labels) if other == label] for label in set(labels))


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 0, 1, 0, 1], [0, 0, 0, 1], [2, 1, 0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 0, 1, 2, 3]],
)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_planted_clusters_are_found(labels, noise):
    found = cluster_experts(_planted(labels, noise), max(labels) + 1)

    assert found == _lists(labels)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_clusters_do_not_depend_on_the_scale_of_the_weights(scale):
    labels = [0, 1, 0, 1, 2]

    found = cluster_experts([scale * expert for expert in _planted(labels, 0.1)], 3)

    assert found == _lists(labels)


def test_experts_of_any_dtype_are_clustered():
    labels = [0, 1, 1, 0, 1]

    found = cluster_experts([expert.bfloat16() for expert in _planted(labels, 0.1)], 2)

    assert found == _lists(labels)


@given(count=st.integers(1, 9), data=st.data(), seed=seeds)
@settings(deadline=None)
def test_every_expert_is_in_one_of_the_requested_number_of_clusters(count, data, seed):
    # Few labels and no noise: many experts and distances are equal.
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
def test_equal_experts_are_split_into_the_requested_number(expert, clusters):
    found = cluster_experts([expert] * 7, clusters)

    assert len(found) == clusters
    assert sorted(k for cluster in found for k in cluster) == list(range(7))


@given(seed=seeds, clusters=st.integers(2, 5))
@settings(deadline=None, max_examples=40)
def test_clusters_do_not_depend_on_the_order_of_the_rows(seed, clusters):
    generator = torch.Generator().manual_seed(seed)
    experts = list(torch.randn(6, 15, 10, generator=generator))
    shuffled = [expert[torch.randperm(15, generator=generator)] for expert in experts]

    assert cluster_experts(shuffled, clusters) == cluster_experts(experts, clusters)


@pytest.mark.parametrize(("block_rows", "sketch_columns"), [(1, 512), (7, 512), (2048, 5)])
def test_small_blocks_and_sketches_find_the_same_clusters(block_rows, sketch_columns):
    labels = [0, 1, 2, 1, 0, 2, 2]
    experts = _planted(labels, 0.2, columns=40)

    found = cluster_experts(experts, 3, sketch_columns=sketch_columns, block_rows=block_rows)

    assert found == _lists(labels)


def test_experts_may_come_from_a_generator():
    labels = [0, 1, 0, 1]
    experts = _planted(labels, 0.1)

    assert cluster_experts((expert for expert in experts), 2) == _lists(labels)


def test_clustering_does_not_change_the_experts():
    experts = _planted([0, 1, 0], 0.1)
    before = [expert.clone() for expert in experts]

    cluster_experts(experts, 2)

    assert all(torch.equal(*pair) for pair in zip(experts, before, strict=True))
