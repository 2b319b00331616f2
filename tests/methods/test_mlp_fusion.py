"""`mlp_fusion` and the clustering of rows that it uses."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.k_means import cluster_rows
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.methods import EncodedGroup, MethodSpec, SourceGroup, method_of

# Two pairs of neurons, H = 1: gate, up, down.
BY_HAND = torch.tensor([[1.0, 1.0, 2.0], [-5.0, 3.0, 1.0], [1.2, 0.8, 4.0], [-5.0, 3.0, 3.0]])


def _fuse(expert_ID: torch.Tensor, shape: ExpertShape, keep: float, seed: int = 0) -> EncodedGroup:
    method = method_of(MethodSpec(name="mlp_fusion", options={"seed": seed}))
    wanted = GroupCodecs(CodecSpec.parse("pruned"), torch.float32, budget=keep)
    return method.encode(SourceGroup(expert_ID.unsqueeze(0), shape), method.codecs(wanted))


@pytest.mark.parametrize("seed", range(4))
def test_centroids_are_stored_with_the_outputs_of_all_their_neurons(seed):
    found = _fuse(BY_HAND, ExpertShape(rows=4, hidden=1), 0.5, seed)

    rows = sorted(found.residuals[0].decode().tolist())
    # Means of the pairs; the outputs 2 and 3 count twice.
    assert rows == [pytest.approx([-5, 3, 4]), pytest.approx([1.1, 0.9, 6])]
    # ‖W − CᵀW̃‖²: 0.1, 0.1 and 1 off in the first pair, 1 in the second.
    assert found.losses[0].squared_error == pytest.approx(2 * (0.01 + 0.01 + 1) + 2, rel=1e-5)
    assert found.losses[0].kept == 6


def test_fused_expert_computes_the_papers_expression():
    shape = ExpertShape(rows=12, hidden=5)
    expert_ID, x_H = torch.randn(12, 15), torch.randn(5)

    stored_CD = _fuse(expert_ID, shape, 0.25).residuals[0].decode()

    # W̃₂ (C Cᵀ) σ(W̃₁ x), from the centroids and the clusters.
    centroids_CD, cluster_I = cluster_rows(expert_ID, 3, 0)
    one_hot_CI = torch.nn.functional.one_hot(cluster_I, 3).T.float()
    gate_CH, up_CH, output_CH = centroids_CD.split(5, dim=1)
    hidden_C = torch.nn.functional.silu(gate_CH @ x_H) * (up_CH @ x_H)
    expected_H = output_CH.T @ (one_hot_CI @ one_hot_CI.T) @ hidden_C
    gate_CH, up_CH, output_CH = stored_CD.split(5, dim=1)
    found_H = output_CH.T @ (torch.nn.functional.silu(gate_CH @ x_H) * (up_CH @ x_H))
    torch.testing.assert_close(found_H, expected_H)


def test_expert_with_as_many_clusters_as_neurons_is_unchanged():
    found = _fuse(torch.randn(6, 9), ExpertShape(rows=6, hidden=3), 1.0)

    assert found.losses[0].squared_error == pytest.approx(0.0, abs=1e-10)


def test_seed_below_zero_is_refused():
    with pytest.raises(ValueError, match="method mlp_fusion: seed -1: must be 0 or more"):
        method_of(MethodSpec(name="mlp_fusion", options={"seed": -1}))


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_rows_have_the_nearest_centroid_and_centroids_are_means(count, seed):
    rows_ID = torch.randn(20, 4)

    centroids_CD, cluster_I = cluster_rows(rows_ID, count, seed)

    assert torch.equal(torch.cdist(rows_ID, centroids_CD).argmin(1), cluster_I)
    for number in range(count):
        torch.testing.assert_close(centroids_CD[number], rows_ID[cluster_I == number].mean(0))


def test_every_centroid_has_rows_even_if_rows_are_equal():
    _, cluster_I = cluster_rows(torch.ones(5, 2), 3, 0)

    assert sorted(set(cluster_I.tolist())) == [0, 1, 2]


def test_same_seed_gives_the_same_clusters_and_leaves_the_global_generator_alone():
    rows_ID = torch.randn(30, 4)
    state = torch.get_rng_state()

    first, second = cluster_rows(rows_ID, 5, 2), cluster_rows(rows_ID, 5, 2)

    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), state)
