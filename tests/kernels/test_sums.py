"""Sums of parts: the C++ kernel gives the bits of a loop over the parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resmoe_dist.kernels.sums import add_up, add_up_reference


def _parts(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different sizes, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.randn(shape, generator=generator).mul(4).exp2()
    return (torch.randn(shape, generator=generator) * size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 0, 8), (3, 2, 8), (8, 7, 37), (16, 60, 1024)])
def test_every_instruction_set_adds_in_the_order_of_the_parts(instruction_set, shape, dtype):
    parts = _parts(*shape, dtype=dtype)
    expected = torch.zeros(shape[1:]).numpy()
    for part in parts.float().numpy():
        expected = np.add(expected, part, dtype=np.float32)

    found = add_up(parts)

    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))
    assert torch.equal(add_up_reference(parts), found)


def test_parts_need_not_be_contiguous(kernels):
    parts = _parts(4, 3, 20, dtype=torch.float32).transpose(1, 2)

    assert torch.equal(add_up(parts), add_up_reference(parts))


def test_not_finite_parts_show_in_the_sum(kernels):
    parts = torch.ones(2, 40, dtype=torch.bfloat16)
    parts[0, 1], parts[1, 38] = float("nan"), float("inf")

    found = add_up(parts)

    assert found[1].isnan()
    assert found[38].isinf()
    assert int(found.isfinite().sum()) == 38


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_added_without_a_kernel(dtype):
    parts = _parts(3, 2, 4, dtype=torch.float32).clamp(-99, 99).to(dtype)

    assert torch.equal(add_up(parts), add_up_reference(parts))
