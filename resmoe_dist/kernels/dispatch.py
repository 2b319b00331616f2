"""Which kernels do the work: by device, dtype and what is installed.

CUDA or ROCm, Triton installed      triton_kernels
CPU, bfloat16 or float32            cpu_kernels (C++, built at first use)
anything else                       reference
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from resmoe_dist.kernels import reference
from resmoe_dist.kernels.cpu import operations as cpu_kernels
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.kernels.rows import CompressedRows


def restore(rows: CompressedRows, out_SC: Tensor, first_column: int = 0) -> None:
    """See `reference.restore`."""
    kernels_for(out_SC.device, rows.dtype).restore(rows, out_SC, first_column)


def project_in(
    x_TH: Tensor, token_N: Tensor, counts_J: list[int], jobs: list[CompressedRows], inputs: int
) -> Tensor:
    """See `reference.project_in`."""
    kernels = kernels_for(x_TH.device, x_TH.dtype)
    return kernels.project_in(x_TH, token_N, counts_J, jobs, inputs)


def project_out(
    h_NS: Tensor,
    token_N: Tensor,
    counts_J: list[int],
    jobs: list[CompressedRows],
    inputs: int,
    num_tokens: int,
    hidden: int,
) -> Tensor:
    """See `reference.project_out`."""
    kernels = kernels_for(h_NS.device, h_NS.dtype)
    return kernels.project_out(h_NS, token_N, counts_J, jobs, inputs, num_tokens, hidden)


def mlp(
    x_TH: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    counts_J: list[int],
    jobs: list[CompressedRows],
    centers: list[Tensor],
    center_J: list[int],
    inputs: int,
    activation: str,
) -> Tensor:
    """See `reference.mlp`. Only where `fuses_mlp`."""
    return cpu_kernels.mlp(
        x_TH, token_N, weight_N, counts_J, jobs, centers, center_J, inputs, activation
    )


def fuses_mlp(device: torch.device, dtype: torch.dtype, activation: str) -> bool:
    """Whether there is a kernel for whole MLPs: elsewhere their two products are apart."""
    return activation in reference.ACTIVATIONS and kernels_for(device, dtype) is cpu_kernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module whose functions work on such tensors."""
    if device.type == "cuda" and _has_triton():
        from resmoe_dist.kernels import triton_kernels

        return triton_kernels
    if device.type == "cpu" and dtype in cpu_kernels.DTYPES and load_kernels():
        return cpu_kernels
    return reference


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
