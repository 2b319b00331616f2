"""Matrices as products with mixtures of a few shared bases, fitted by gradient descent.

MoBE (Chen et al. 2025, arXiv:2508.05257): X_k ≈ A_k · silu(Σ_i α_ki B_i), with α_k from a softmax.
All are chosen to minimise the squared error. For given bases and mixtures the best A_k solve a
linear least-squares problem, so descent (Adam) is over bases and mixtures alone.

Results depend on the number of threads, as descent amplifies rounding.

Legend: E experts, I rows, W columns, m bases, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs.svd import low_rank_factors

# Root mean square of the first bases. silu is almost linear there, so they start as singular
# vectors.
_START_SIZE = 0.2
# How much more an expert's own basis counts at first: logits of its mixture.
_START_LOGIT = 3.0
_BASES_RATE, _LOGITS_RATE = 0.01, 0.05
# Of the mean diagonal of a mixture's Gram matrix.
_DAMPING = 1e-6


@dataclass(frozen=True)
class Mixtures:
    """X_k ≈ left_EIr[k] · silu(Σ_i mixing_Em[k, i] · bases_mrW[i]), float32."""

    left_EIr: Tensor
    mixing_Em: Tensor
    bases_mrW: Tensor

    def restored(self) -> Tensor:
        """What the matrices became, [E, I, W]."""
        return self.left_EIr @ _mixed(self.mixing_Em, self.bases_mrW)


def fit_mixtures(matrices_EIW: Tensor, bases: int, rank: int, steps: int) -> Mixtures:
    """The best mixtures that `steps` steps find. matrices_EIW: float32, on any device.

    Starts from the leading singular vectors that the experts k, k + m, k + 2m … share.
    """
    scale = float(matrices_EIW.square().mean().sqrt()) or 1.0
    x_EIW = matrices_EIW / scale
    bases_mrW = _first_bases(x_EIW, bases, rank).requires_grad_()
    own_Em = F.one_hot(torch.arange(len(x_EIW)) % bases, bases).to(x_EIW)
    logits_Em = (_START_LOGIT * own_Em).requires_grad_()
    optimizer = torch.optim.Adam(
        [
            {"params": [bases_mrW], "lr": _BASES_RATE},
            {"params": [logits_Em], "lr": _LOGITS_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best, best_error = None, float("inf")
    for step in range(steps + 1):
        with torch.enable_grad():
            mixing_Em = logits_Em.softmax(1)
            mixed_ErW = _mixed(mixing_Em, bases_mrW)
            left_EIr = _best_left(x_EIW, mixed_ErW.detach())
            error = (x_EIW - left_EIr @ mixed_ErW).square().mean()
        if float(error.detach()) < best_error:
            best_error = float(error.detach())
            best = Mixtures(scale * left_EIr, mixing_Em.detach(), bases_mrW.detach().clone())
        if step < steps:
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
    assert best is not None, "errors are finite"
    return best


def _mixed(mixing_Em: Tensor, bases_mrW: Tensor) -> Tensor:
    """silu of each expert's mixture [E, r, W]."""
    return F.silu(torch.tensordot(mixing_Em, bases_mrW, dims=1))


def _first_bases(x_EIW: Tensor, bases: int, rank: int) -> Tensor:
    """Leading right singular vectors [m, r, W] of every m-th expert's rows, of one size.

    Basis i is that of experts i, i + m …; if there are more bases than experts, they repeat.
    """
    found = []
    for i in range(bases):
        rows_NW = x_EIW[i % len(x_EIW) :: bases].flatten(0, 1)
        _, right_rW = low_rank_factors(rows_NW, rank)
        found.append(F.normalize(right_rW, dim=1))
    bases_mrW = torch.stack(found).contiguous()
    return bases_mrW * (_START_SIZE / bases_mrW.square().mean().sqrt().clamp_min(1e-30))


def _best_left(x_EIW: Tensor, mixed_ErW: Tensor) -> Tensor:
    """A_k [E, I, r] that minimise ‖X_k − A_k · mixed_k‖²."""
    gram_Err = mixed_ErW @ mixed_ErW.mT
    diagonal_Er = gram_Err.diagonal(dim1=1, dim2=2)
    damping_E1 = _DAMPING * diagonal_Er.mean(1, keepdim=True).clamp_min(1e-30)
    diagonal_Er += damping_E1
    return torch.linalg.solve(gram_Err, mixed_ErW @ x_EIW.mT).mT
