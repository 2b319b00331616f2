"""Muon for stacks of matrices, such as fused experts; PyTorch's takes single matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Of the quintic iteration that brings singular values near 1 (Jordan et al. 2024, "Muon").
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class StackedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for parameters [..., rows, columns], without weight decay.

    Each matrix is orthogonalised by itself, in float32. Updates have the size of AdamW's: they are
    scaled by 0.2·√max(rows, columns) (arXiv:2502.16982, section 2.2).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' gradients. Closures are not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(buffer, group["momentum"]))
                size = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * size)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices [..., rows, columns] with the same singular vectors and singular values near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x
