"""Sums of the parts that several ranks computed of the same numbers.

Legend: P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.kernels.cpu.backend import DTYPES
from resmoe_dist.kernels.cpu.build import load_kernels


def add_up(parts_P: Tensor) -> Tensor:
    """The sum over the first dimension, in its order, in float32, rounded once to the dtype.

    `Tensor.sum` may use another order for some entries, so a token's sum would depend on its place.
    """
    if parts_P.device.type == "cpu" and parts_P.dtype in DTYPES and load_kernels():
        return torch.ops.resmoe.add_up(parts_P.contiguous())
    return add_up_reference(parts_P)


def add_up_reference(parts_P: Tensor) -> Tensor:
    """The same, one part after the other."""
    first, *others = parts_P
    total = first.to(torch.float32, copy=True)
    for part in others:
        total += part
    return total.to(parts_P.dtype)
