"""Random pairs of a target and an expert for assignment tests, and the reference optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression.certificate import supports_int8_products

PAIR_KINDS = [
    "unrelated",
    "related",
    "bfloat16",
    "float16",
    "duplicate rows",
    "zero rows",
    "zeros",
    "an outlier column",
    "an outlier row",
    "rows of all magnitudes",
    "coarse",
    "constant",
]
every_kind = pytest.mark.parametrize("kind", PAIR_KINDS)
needs_int8 = pytest.mark.skipif(
    not supports_int8_products(1), reason="this CPU has no 8-bit products"
)


def random_pair(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A target and an expert [I, D] of one of PAIR_KINDS.

    Except for "unrelated" and "constant", the expert starts as a noisy permuted copy of the target.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target, order = normal(rows, columns), torch.randperm(rows, generator=generator)
    if kind == "unrelated":
        return target, normal(rows, columns)
    expert = target[order] + 0.1 * normal(rows, columns)
    if kind == "bfloat16":
        return target, expert.bfloat16()
    if kind == "float16":
        return target, expert.half()
    if kind == "duplicate rows":
        expert[: rows // 3] = expert[-1]
        target[rows // 2 :] = target[0]
    elif kind == "zero rows":
        expert[::3], target[::4] = 0, 0
    elif kind == "zeros":
        expert[:] = 0
    elif kind == "an outlier column":
        expert[:, 1], target[:, 1] = 1000 * expert[:, 1], 1000 * target[:, 1]
    elif kind == "an outlier row":
        expert[order.argmin()], target[0] = 1e6 * expert[order.argmin()], 1e6 * target[0]
    elif kind == "rows of all magnitudes":
        magnitude = 10 ** (10 * torch.rand(rows, 1, generator=generator) - 5)
        target, expert = magnitude * target, magnitude[order] * expert
    elif kind == "coarse":
        target, expert = target.round(), expert.round()
    elif kind == "constant":
        target, expert = torch.ones(rows, columns), torch.full((rows, columns), 2.0)
    else:
        assert kind == "related"
    return target, expert


def near_ties(rows: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """target, expert and the optimal assignment: the target is the expert's rows in another order.

    The first `pairs` pairs of expert rows differ by about a hundredth: 8 bits cannot separate them,
    float32 can. All rows have norm 1, so each row's best partner is its copy.
    """
    expert = torch.randn(rows, 64)
    expert[1 : 2 * pairs : 2] = expert[0 : 2 * pairs : 2] + 0.01 * torch.randn(pairs, 64)
    expert = torch.nn.functional.normalize(expert, dim=1)
    best = torch.randperm(rows)
    return expert[best], expert, best


def is_permutation(perm: Tensor, rows: int) -> bool:
    """Whether `perm` is a permutation of range(rows)."""
    return sorted(perm.tolist()) == list(range(rows))


def assert_optimal(found: Tensor, target: Tensor, expert: Tensor) -> None:
    """Assert that no assignment has a higher score than `found`, up to float32 rounding."""
    scores = target.double().numpy() @ expert.double().numpy().T
    best = scores[linear_sum_assignment(scores, maximize=True)].sum()
    assert is_permutation(found, len(target))
    rounding = 1e-6 * np.abs(scores).max(1).sum()
    assert scores[np.arange(len(target)), found.numpy()].sum() >= best - rounding
