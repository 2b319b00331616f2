"""The claims of the method, on real trained experts: each step lowers the error."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import PrunedResidual
from resmoe_dist.compression.assignment import align
from resmoe_dist.compression.center import encode_group

KEEP = 0.25


@pytest.fixture(scope="module")
def groups(embedded_source) -> list[torch.Tensor]:
    """All experts [N, I, D] of each layer of the embedded Mixtral: one group a layer."""
    source = SourceCheckpoint(embedded_source)
    return [
        torch.stack([source.read_expert(layer, k)[0] for k in range(site.num_experts)])
        for layer, site in enumerate(source.sites)
    ]


def _error(aligned_NID: torch.Tensor, center: str) -> float:
    encoded = encode_group(
        aligned_NID, PrunedResidual, center=center, keep=KEEP, dtype=torch.float32
    )
    center_ID = encoded.center_ID
    restored = torch.stack([center_ID + residual.decode() for residual in encoded.residuals])
    return float((aligned_NID - restored).double().square().sum())


def _plain_pruning_error(experts_NID: torch.Tensor) -> float:
    """Magnitude pruning of the experts themselves, each at the same share of entries."""
    error = 0.0
    for expert_ID in experts_NID:
        magnitudes = expert_ID.abs().flatten().sort().values
        dropped = magnitudes[: magnitudes.numel() - int(KEEP * magnitudes.numel())]
        error += float(dropped.double().square().sum())
    return error


def test_pruning_around_a_barycentre_beats_plain_pruning(groups):
    for experts_NID in groups:
        aligned_NID = align(experts_NID, "loo").apply(experts_NID)
        assert _error(aligned_NID, "barycenter") < _plain_pruning_error(experts_NID)


def test_the_joint_centre_is_a_fifth_below_the_barycentre(groups):
    for experts_NID in groups:
        aligned_NID = align(experts_NID, "loo").apply(experts_NID)
        assert _error(aligned_NID, "joint") <= 0.8 * _error(aligned_NID, "barycenter")


@pytest.mark.parametrize("shuffled", [False, True])
def test_leave_one_out_is_never_above_pot(groups, shuffled):
    for experts_NID in groups:
        if shuffled:
            experts_NID = torch.stack([e[torch.randperm(len(e))] for e in experts_NID])
        found, pots = align(experts_NID, "loo").objective, align(experts_NID, "pot").objective
        assert found <= pots * (1 + 1e-9)


def test_shuffled_experts_are_aligned_as_well_as_unshuffled_ones(groups):
    for experts_NID in groups:
        shuffled_NID = torch.stack([e[torch.randperm(len(e))] for e in experts_NID])
        expected = align(experts_NID, "loo").objective
        assert align(shuffled_NID, "loo").objective == pytest.approx(expected, rel=1e-5)
        assert align(shuffled_NID, "none").objective > 2 * expected
