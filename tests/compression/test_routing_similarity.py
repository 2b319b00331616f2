"""Experts that the router treats alike are found, and clustered as by hand."""

from __future__ import annotations

import math

import pytest
import torch

from resmoe_dist.compression.routing_similarity import router_similarity, spectral_clusters
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.errors import UserError


def _samples(logits_TE: torch.Tensor | None) -> LayerSamples:
    nothing = torch.zeros(0, 1)
    return LayerSamples(
        inputs_TH=nothing, index_TK=nothing.long(), weights_TK=nothing, logits_TE=logits_TE
    )


def test_similarity_is_the_cosine_of_two_experts_logits():
    found = router_similarity(_samples(torch.tensor([[3.0, 1.0, -3.0], [4.0, 0.0, -4.0]])))

    expected = [[1.0, 0.6, -1.0], [0.6, 1.0, -0.6], [-1.0, -0.6, 1.0]]
    assert found.tolist() == [pytest.approx(row) for row in expected]


def test_experts_without_known_logits_are_refused():
    with pytest.raises(UserError, match="this method compares router logits"):
        router_similarity(_samples(None))


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 0, 1, 2, 2, 1, 0, 2], [0, 1, 2, 3, 4, 4]])
def test_planted_clusters_are_found(labels):
    count = len(labels)
    alike = [[1.0 if a == b else 0.1 for b in labels] for a in labels]

    found = spectral_clusters(torch.tensor(alike, dtype=torch.float64), max(labels) + 1)

    expected = [[k for k in range(count) if labels[k] == label] for label in range(max(labels) + 1)]
    assert found == sorted(expected)


def test_graph_is_cut_where_the_normalised_cut_is_smallest():
    # A chain of six experts with a weak link between the second and the third.
    weights = [1.0, 0.05, 1.0, 0.8, 1.0]
    affinity = torch.eye(6, dtype=torch.float64)
    for k, weight in enumerate(weights):
        affinity[k, k + 1] = affinity[k + 1, k] = weight

    def cut(first: list[int]) -> float:
        inside = torch.tensor([k in first for k in range(6)])
        between = affinity[inside][:, ~inside].sum()
        graph = affinity - torch.eye(6)
        return float(between / graph[inside].sum() + between / graph[~inside].sum())

    halves = [[k for k in range(6) if number >> k & 1] for number in range(1, 63)]
    best = min(halves, key=cut)

    found = spectral_clusters(affinity, 2)

    assert math.isclose(cut(found[0]), cut(best))


def test_equal_experts_are_still_split_into_the_wanted_number():
    found = spectral_clusters(torch.ones(5, 5, dtype=torch.float64), 3)

    assert len(found) == 3
    assert sorted(k for part in found for k in part) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("clusters", [1, 3])
def test_one_cluster_and_one_per_expert(clusters):
    found = spectral_clusters(torch.eye(3, dtype=torch.float64), clusters)

    assert found == ([[0, 1, 2]] if clusters == 1 else [[0], [1], [2]])
