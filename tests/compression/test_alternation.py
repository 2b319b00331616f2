"""Centres of codecs that do not select entries: alternation of centre and residuals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, Moments, register_codec
from tests.compression.encoding_cases import encode, weights_and_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_alternation_never_ends_above_the_barycentre(dtype, weighted):
    weights = weights_and_matrix(12, 18)[0] if weighted else None
    for trial in range(5):
        generator = torch.Generator().manual_seed(trial)
        base = torch.randn(12, 18, generator=generator)
        experts = base + (0.1 + trial / 5) * torch.randn(4, 12, 18, generator=generator)
        for keep in (0.1, 0.4, 0.8):
            joint, barycenter = (
                encode(experts, "low_rank", center=name, keep=keep, dtype=dtype, weights=weights)
                for name in ("joint", "barycenter")
            )
            assert joint.squared_error <= barycenter.squared_error


def test_round_that_raises_the_error_is_not_returned():
    experts = torch.randn(4, 5, 6)
    shares = [0.9] * 4 + [0.1] * 4

    @register_codec
    class Shrinking(DenseMatrix):
        """Keeps a share of every entry, less in the second round."""

        name = "shrinking"

        @classmethod
        def encode(
            cls,
            matrix_ID: Tensor,
            config: Any,
            dtype: torch.dtype,
            mask_ID: Tensor | None = None,
            moments: Moments | None = None,
        ) -> DenseMatrix:
            return DenseMatrix.of(shares.pop(0) * matrix_ID)

    encoded = encode(experts, "shrinking")

    assert not shares
    exact = experts - experts.mean(0)
    expected = [float((0.1 * expert).double().square().sum()) for expert in exact]
    assert [loss.squared_error for loss in encoded.losses] == pytest.approx(expected, rel=1e-4)


def test_alternation_finds_the_centre_that_makes_every_residual_low_rank():
    # Each expert differs from the base by a matrix of rank 1, but from their mean by rank 6.
    base = torch.randn(12, 18)
    experts = base + torch.randn(6, 12, 1) @ torch.randn(6, 1, 18)

    joint, barycenter = (
        encode(experts, "low_rank", center=name, keep=0.15) for name in ("joint", "barycenter")
    )

    assert joint.residuals[0].left.shape == (12, 1)
    assert joint.squared_error < 0.01 * barycenter.squared_error
