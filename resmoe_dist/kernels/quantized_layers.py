"""What the kernels of every device know of layers with quantised residuals.

Legend: R rows, C columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resmoe_dist.codecs import QuantizedMatrix
from resmoe_dist.kernels.layer import LayerWeights


def quantized_matrices(layer: LayerWeights) -> list[QuantizedMatrix]:
    """Residuals, then centres; without those of other codecs."""
    matrices = (*layer.residuals, *layer.centers)
    return [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]


def are_in_steps(layer: LayerWeights, step: int) -> bool:
    """Whether entries can be decoded `step` at a time, and all matrices are rotated alike.

    The entries of a step share one scale.
    """
    matrices = quantized_matrices(layer)
    return all(
        (matrix.group % step == 0 or matrix.group >= matrix.hidden)
        and matrix.hidden == layer.hidden
        and matrix.blocks == layer.inputs + 1
        and matrix.is_rotated == matrices[0].is_rotated
        for matrix in matrices
    )


def restore_with_biases(
    restore_entries: Callable[[int, Tensor, int, int], None],
    layer: LayerWeights,
    expert: int,
    out_RC: Tensor,
    first_row: int,
    first_column: int,
) -> None:
    """`Backend.restore`, by a kernel that restores coded entries. Row biases are not coded."""
    rows, columns = out_RC.shape
    coded = layer.hidden * (layer.inputs + 1)
    here = min(max(coded - first_column, 0), columns)
    if here:
        restore_entries(expert, out_RC[:, :here], first_row, first_column)
    if here == columns:
        return
    center = layer.center_of[expert]
    matrices = [layer.residuals[expert]]
    matrices += [layer.centers[center]] if center >= 0 else []
    bias_RC = torch.zeros(rows, columns - here, device=out_RC.device)
    for matrix in matrices:
        part = matrix.slice_rows(first_row, first_row + rows)
        bias_RC += part.decode_columns(first_column + here, columns - here).float()
    out_RC[:, here:] = bias_RC
