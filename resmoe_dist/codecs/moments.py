"""Second moments of what a matrix is multiplied with: which errors of its entries matter.

An error Δ of a projection changes its outputs by E‖Δx‖² = tr(Δ S Δᵀ), with S = E[x xᵀ]. Codecs that
know S may choose errors that cancel (GPTQ, arXiv:2210.17323; SVD-LLM, arXiv:2403.07378).

Legend: H hidden, I rows of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_dist.codecs.rotation import rotate


@dataclass(frozen=True)
class Moments:
    """Of one expert, float32.

    input_HH: of the hidden states that its input projections read. neuron_II: of the activations
    that its output projection reads, in the order of the matrix's rows.
    """

    input_HH: Tensor
    neuron_II: Tensor

    def rotated(self) -> Tensor:
        """Q S Qᵀ [H, H] of the inputs."""
        return rotate(rotate(self.input_HH).T).T


def inverse_root(moment_MM: Tensor, damping: float) -> Tensor:
    """The upper U [M, M] with Uᵀ U = (S + damping · mean(diagonal) · 1)⁻¹, float32.

    The identity if S is zero.
    """
    identity_MM = torch.eye(len(moment_MM), dtype=torch.float64)
    scale = float(moment_MM.diagonal().double().mean())
    if scale <= 0:
        return identity_MM.float()
    damped_MM = moment_MM.double() / scale + damping * identity_MM
    inverse_MM = torch.cholesky_inverse(torch.linalg.cholesky(damped_MM))
    return torch.linalg.cholesky(inverse_MM, upper=True).float()
