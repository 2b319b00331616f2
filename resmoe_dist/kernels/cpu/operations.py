"""The operations of `reference` by the C++ kernels: bfloat16 and float32 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.kernels.rows import CompressedRows

DTYPES = (torch.bfloat16, torch.float32)


def restore(rows: CompressedRows, out_SC: Tensor, first_column: int = 0) -> None:
    """As `reference.restore`, the columns of a row taken in one piece."""
    torch.ops.resmoe.restore(
        out_SC, rows.center, rows.bitmap, rows.values, rows.row_offsets, first_column
    )


def project_in(
    x_TH: Tensor, token_N: Tensor, counts_J: list[int], jobs: list[CompressedRows], inputs: int
) -> Tensor:
    """As `reference.project_in`."""
    rows = jobs[0].count if jobs else 0
    return torch.ops.resmoe.project_in(x_TH, token_N, counts_J, *_tensors(jobs), inputs, rows)


def project_out(
    h_NS: Tensor,
    token_N: Tensor,
    counts_J: list[int],
    jobs: list[CompressedRows],
    inputs: int,
    num_tokens: int,
    hidden: int,
) -> Tensor:
    """As `reference.project_out`."""
    return torch.ops.resmoe.project_out(
        h_NS, token_N, counts_J, *_tensors(jobs), inputs, num_tokens, hidden
    )


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
    """As `reference.mlp`, in one pass over the rows, which nothing in between leaves the caches of.

    With so many tokens that the sums of all threads would take over 64 MB, jobs take shared centres
    along as their own, and the sum of centre and residual is rounded as `restore` does.
    """
    rows = jobs[0].count if jobs else len(centers[0]) if centers else 0
    tensors = _tensors(jobs)
    return torch.ops.resmoe.mlp(
        x_TH, token_N, weight_N, counts_J, *tensors, centers, center_J, inputs, rows, activation
    )


def instruction_sets() -> list[str]:
    """Those of this machine that there are kernels for, best first."""
    return torch.ops.resmoe.instruction_sets()


def use_instruction_set(name: str) -> None:
    """Take another than the best, to test or to time it. RuntimeError where there is none such."""
    torch.ops.resmoe.use_instruction_set(name)


def _tensors(jobs: list[CompressedRows]) -> tuple[list[Tensor | None], ...]:
    return (
        [rows.center for rows in jobs],
        [rows.bitmap for rows in jobs],
        [rows.values for rows in jobs],
        [rows.row_offsets for rows in jobs],
    )
