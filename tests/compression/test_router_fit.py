"""A refitted router's weight is the answer of an augmented least-squares problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resmoe_dist.compression.router_fit import refit_router

EXPERTS, HIDDEN = 5, 12


def _problem(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with correlated dimensions, missing logits, and a weight."""
    inputs_TH = torch.randn(tokens, HIDDEN) @ torch.randn(HIDDEN, HIDDEN) + torch.randn(HIDDEN)
    return inputs_TH, torch.randn(tokens, EXPERTS) + 1, torch.randn(EXPERTS, HIDDEN)


def _expected(inputs_TH: Tensor, missing_TE: Tensor, weight_EH: Tensor, ridge: float) -> Tensor:
    """[X; √λ I] Δᵀ = [missing; 0] in the least-squares sense."""
    x_TH = inputs_TH.double()
    penalty = (ridge * x_TH.square().sum(0).mean()).sqrt() * torch.eye(HIDDEN, dtype=torch.float64)
    zeros = torch.zeros(HIDDEN, EXPERTS, dtype=torch.float64)
    answer = torch.linalg.lstsq(
        torch.cat([x_TH, penalty]), torch.cat([missing_TE.double(), zeros])
    ).solution
    return weight_EH.double() + answer.T


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
@pytest.mark.parametrize("tokens", [7, 40, 1100])  # fewer than dimensions, more, several blocks
def test_weight_is_the_least_squares_answer(tokens, ridge):
    problem = _problem(tokens)

    found = refit_router(*problem, ridge)

    assert found.dtype == torch.float64
    torch.testing.assert_close(found, _expected(*problem, ridge), rtol=1e-8, atol=1e-8)


def test_weight_stays_if_no_logit_is_missing():
    inputs_TH, _, weight_EH = _problem(40)

    found = refit_router(inputs_TH, torch.zeros(40, EXPERTS), weight_EH)

    assert torch.equal(found, weight_EH.double())


def test_weight_stays_if_all_inputs_are_zero():
    _, missing_TE, weight_EH = _problem(40)

    found = refit_router(torch.zeros(40, HIDDEN), missing_TE, weight_EH)

    assert torch.equal(found, weight_EH.double())


def test_the_means_of_tokens_do_not_change_the_softmax():
    inputs_TH, missing_TE, weight_EH = _problem(40)
    centered_TE = missing_TE - missing_TE.mean(1, keepdim=True)

    found = refit_router(inputs_TH, missing_TE, weight_EH)
    centered = refit_router(inputs_TH, centered_TE, weight_EH)

    assert (found - centered).abs().max() > 1e-3
    x_TH = inputs_TH.double()
    torch.testing.assert_close((x_TH @ found.T).softmax(1), (x_TH @ centered.T).softmax(1))
