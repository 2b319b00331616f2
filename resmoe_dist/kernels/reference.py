"""What the operations mean, in plain PyTorch: every kernel is tested against this file.

A design matrix row is [inputs | output | biases]: the first `inputs`·H columns multiply the hidden
state on its way in, the next H columns write it on the way out (resmoe_dist.design_matrix).

Legend: T tokens, N copies (a token sent to an expert), S rows, H hidden, D columns, J jobs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs.bitmap import unpack_bitmap
from resmoe_dist.kernels.rows import CompressedRows

# What `mlp` has between its products.
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def restore(rows: CompressedRows, out_SC: Tensor, first_column: int = 0) -> None:
    """Columns [first_column, first_column + C) of the rows, dense, into `out_SC`.

    The sum of centre and residual is rounded once to the dtype of `out`.
    """
    columns = slice(first_column, first_column + out_SC.shape[1])
    dense_SC = torch.zeros_like(out_SC)
    if rows.center is not None:
        dense_SC = rows.center[:, columns].clone()
    if rows.bitmap is not None:
        mask_SD = unpack_bitmap(rows.bitmap, 8 * rows.bitmap.shape[1])
        values = rows.values[int(rows.row_offsets[0]) :]
        residual_SD = values.new_zeros(mask_SD.shape).masked_scatter_(mask_SD, values)
        dense_SC += residual_SD[:, columns]
    out_SC.copy_(dense_SC)


def project_in(
    x_TH: Tensor, token_N: Tensor, counts_J: list[int], jobs: list[CompressedRows], inputs: int
) -> Tensor:
    """Products of copies with the input columns of their rows: [N, inputs·S], float32.

    token_N: int64, the row of x that each copy is of; the first counts_J[0] copies belong to
    jobs[0], and so on. All jobs have equally many rows. Each product is x · (centre + residual)ᵀ,
    the sum rounded as `restore` does.
    """
    H = x_TH.shape[1]
    S = jobs[0].count if jobs else 0
    out_NC = torch.empty(len(token_N), inputs * S, dtype=torch.float32, device=x_TH.device)
    end = 0
    for rows, count in zip(jobs, counts_J, strict=True):
        begin, end = end, end + count
        dense_SC = torch.empty(S, inputs * H, dtype=rows.dtype, device=x_TH.device)
        restore(rows, dense_SC)
        x_nH = x_TH[token_N[begin:end]].float()
        for i in range(inputs):
            weight_SH = dense_SC[:, i * H : (i + 1) * H].float()
            out_NC[begin:end, i * S : (i + 1) * S] = x_nH @ weight_SH.T
    return out_NC


def project_out(
    h_NS: Tensor,
    token_N: Tensor,
    counts_J: list[int],
    jobs: list[CompressedRows],
    inputs: int,
    num_tokens: int,
    hidden: int,
) -> Tensor:
    """Products of activations with the output columns, added up per token: [T, H], float32.

    h_NS: one row per copy, jobs and copies as in `project_in`; copies of one token are summed.
    """
    out_TH = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=h_NS.device)
    end = 0
    for rows, count in zip(jobs, counts_J, strict=True):
        begin, end = end, end + count
        weight_SH = torch.empty(rows.count, hidden, dtype=rows.dtype, device=h_NS.device)
        restore(rows, weight_SH, inputs * hidden)
        out_TH.index_add_(0, token_N[begin:end], h_NS[begin:end].float() @ weight_SH.float())
    return out_TH


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
    """Whole MLPs: for each token the weighted sum over its copies, [T, H], float32.

    weight_N: float32. centers: matrices [S, D] that jobs without one of their own share; center_J:
    which one each job takes besides its rows, -1 for none. activation: one of ACTIVATIONS, of the
    first input; with two, times the second. Activations times weights are rounded to the dtype of
    x once; for a shared centre their sums are.
    """
    S = jobs[0].count if jobs else 0
    in_NC = project_in(x_TH, token_N, counts_J, jobs, inputs)
    copies_J = torch.arange(len(token_N)).split(counts_J)
    for n, center in zip(copies_J, center_J, strict=True):
        if center >= 0:
            rows = [CompressedRows(centers[center])]
            in_NC[n] += project_in(x_TH, token_N[n], [len(n)], rows, inputs)
    h_NS = ACTIVATIONS[activation](in_NC[:, :S])
    if inputs == 2:
        h_NS = h_NS * in_NC[:, S:]
    h_NS = h_NS * weight_N.unsqueeze(1)
    size = (counts_J, jobs, inputs, *x_TH.shape)
    out_TH = project_out(h_NS.to(x_TH.dtype), token_N, *size)
    for c, center_SD in enumerate(centers):
        n = [copies for copies, center in zip(copies_J, center_J, strict=True) if center == c]
        if n:
            sum_TS = torch.zeros(len(x_TH), S, device=x_TH.device)
            sum_TS.index_add_(0, token_N[torch.cat(n)], h_NS[torch.cat(n)])
            every_T, rows = torch.arange(len(x_TH)), [CompressedRows(center_SD)]
            size = ([len(x_TH)], rows, inputs, *x_TH.shape)
            out_TH += project_out(sum_TS.to(x_TH.dtype), every_T, *size)
    return out_TH
