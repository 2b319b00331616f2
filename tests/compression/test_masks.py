"""Which residual entries are kept: how many, of which experts, and the largest ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resmoe_dist.compression.blocks import BlockSizes
from resmoe_dist.compression.masks import BALANCED_RUN
from tests.compression.encoding_cases import (
    center_of,
    encode,
    every_allocation,
    every_center,
    kept_entries,
    weights_and_matrix,
)


@every_center
@pytest.mark.parametrize("keep", [0.0, 0.013, 0.25, 0.5])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_each_expert_keeps_its_share_exactly(center, keep, weighted):
    # Residuals of very different size: a shared budget would go almost entirely to the last.
    experts = torch.randn(4, 13, 17) * torch.tensor([0.1, 1.0, 1.0, 9.0]).view(4, 1, 1)
    weights = weights_and_matrix(13, 17)[0] if weighted else None

    encoded = encode(experts, center=center, keep=keep, allocate="expert", weights=weights)

    assert kept_entries(encoded) == [int(keep * 13 * 17)] * 4


@every_center
@pytest.mark.parametrize("keep", [0.0, 0.013, 0.25, 0.5])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_group_keeps_exactly_its_share_and_the_largest_residuals(center, keep, weighted):
    experts = torch.randn(4, 13, 17) * torch.tensor([0.1, 1.0, 1.0, 9.0]).view(4, 1, 1)
    weights, matrix = weights_and_matrix(13, 17) if weighted else (None, 1.0)

    encoded = encode(experts, center=center, keep=keep, weights=weights)

    assert sum(kept_entries(encoded)) == int(keep * 4 * 13 * 17)
    magnitudes = np.abs(matrix * (experts.double().numpy() - center_of(encoded)))
    kept = np.stack([residual.decode().numpy() != 0 for residual in encoded.residuals])
    assert magnitudes[kept].min(initial=np.inf) >= magnitudes[~kept].max() * (1 - 1e-6)


@every_center
@every_allocation
@pytest.mark.parametrize("sample_entries", [40, 1 << 19], ids=["a sample", "all entries"])
def test_exactly_the_budget_is_kept_of_equal_residuals(center, allocate, sample_entries):
    sizes = BlockSizes(block_values=60, sample_entries=sample_entries)
    # Residuals are zero only where experts agree; most are equal.
    experts = torch.randint(1, 4, (4, 15, 20)).float() * (2 * torch.randint(2, (4, 15, 20)) - 1)

    for keep in (0.1, 1 / 3, 0.5):
        encoded = encode(experts, center=center, keep=keep, allocate=allocate, sizes=sizes)

        budget = [int(keep * 300)] * 4 if allocate == "expert" else [int(keep * 1200)]
        center_ID = 0.0 if encoded.center is None else encoded.center.decode()
        nonzero = (experts != center_ID).sum((1, 2)).tolist()
        kept = kept_entries(encoded)
        if allocate != "expert":
            nonzero, kept = [sum(nonzero)], [sum(kept)]
        assert kept == [min(pair) for pair in zip(budget, nonzero, strict=True)]


def test_zeros_are_never_kept():
    experts = torch.randn(3, 8, 10)
    experts[:, ::2] = 0

    encoded = encode(experts, center="none", keep=0.9)

    assert sum(kept_entries(encoded)) == 3 * 4 * 10
    assert all(bool((residual.values != 0).all()) for residual in encoded.residuals)


@pytest.mark.parametrize("columns", [64, 192, 200])
def test_balanced_mask_keeps_the_same_number_of_every_run(columns):
    experts = torch.randn(3, 10, columns)

    encoded = encode(experts, keep=0.25, allocate="block")

    for residual, expert in zip(encoded.residuals, experts, strict=True):
        kept = residual.decode() != 0
        magnitudes = (expert - encoded.center.decode()).abs()
        for first in range(0, columns, BALANCED_RUN):
            run = slice(first, first + BALANCED_RUN)
            count = kept[:, run].shape[1] // 4
            assert (kept[:, run].sum(1) == count).all()
            least_kept = magnitudes[:, run].masked_fill(~kept[:, run], torch.inf).amin(1)
            largest_dropped = magnitudes[:, run].masked_fill(kept[:, run], 0).amax(1)
            assert (least_kept >= largest_dropped).all()


def test_balanced_mask_keeps_nearly_the_energy_of_an_unconstrained_one():
    """98.9 % of it at 16 of 64, for Gaussian residuals."""
    experts = torch.randn(1, 64, 4096)

    def energy(allocate: str) -> float:
        encoded = encode(experts, center="none", keep=0.25, allocate=allocate)
        return float(encoded.residuals[0].decode().square().sum())

    assert 0.98 <= energy("block") / energy("expert") < 1
