"""Muon on stacks of matrices, beside singular value decompositions and PyTorch's Muon."""

import pytest
import torch

from resmoe_dist.testing.stacked_muon import StackedMuon, orthogonalized


@pytest.mark.parametrize("shape", [(3, 20, 48), (2, 48, 20), (5, 16, 16)])
def test_singular_values_become_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    for before, after in zip(matrices, orthogonalized(matrices), strict=True):
        assert after.shape == before.shape
        values = torch.linalg.svdvals(after)
        assert values.max() < 1.3 and values.median() > 0.6
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        found = left.T @ after @ right.T
        assert (found - found.diag().diag()).abs().max() < 1e-3


def test_steps_are_those_of_pytorch_on_each_matrix():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 24, 32), torch.randn(4, 3, 24, 32)
    stack = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    ours = StackedMuon([stack], lr=0.01)
    theirs = torch.optim.Muon(single, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        stack.grad = gradient.clone()
        for matrix, part in zip(single, gradient, strict=True):
            matrix.grad = part.clone()
        ours.step()
        theirs.step()
    for found, matrix, before in zip(stack, single, start, strict=True):
        moved = (matrix - before).norm()
        # PyTorch orthogonalises in bfloat16.
        assert moved > 0.1 and (found - matrix).norm() < 0.03 * moved
