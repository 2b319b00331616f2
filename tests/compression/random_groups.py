"""Random groups of experts for alignment tests, and the paper's objective in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP_KINDS = ["unrelated", "related", "far", "upcycled", "half"]


def random_group(
    kind: str, count: int, rows: int, columns: int, generator: torch.Generator
) -> Tensor:
    """Experts [E, I, D] of one of GROUP_KINDS.

    unrelated: independent. related, far: permuted copies of one matrix with noise. half: the same
    with half of the rows replaced. upcycled: noisy copies, not permuted.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "unrelated":
        return normal(count, rows, columns)
    noise = {"related": 0.7, "far": 1.5, "upcycled": 0.3, "half": 0.2}[kind]
    experts = normal(rows, columns) + noise * normal(count, rows, columns)
    if kind == "half":
        replaced = torch.rand(count, rows, 1, generator=generator) < 0.5
        experts = experts.where(~replaced, normal(count, rows, columns))
    if kind == "upcycled":
        return experts
    orders = [torch.randperm(rows, generator=generator) for _ in range(count)]
    return torch.stack([expert[order] for expert, order in zip(experts, orders, strict=True)])


def paper_objective(experts: Tensor, perms: Tensor) -> float:
    """Paper 001, equation 4, written literally."""
    aligned = np.stack([experts[k].double().numpy()[perm] for k, perm in enumerate(perms)])
    center = aligned.mean(0)
    return sum(np.linalg.norm(expert - center) ** 2 for expert in aligned) / len(experts)


def assert_permutations(perms: Tensor, rows: int) -> None:
    """Assert that each row of `perms` is a permutation of range(rows)."""
    assert all(sorted(perm.tolist()) == list(range(rows)) for perm in perms)
