"""The CPU backend for quantised centres and residuals.

Rows stay packed, and rotated: the kernels decode them in registers. Tokens are rotated once per
layer on the way in, and outputs once on the way out.

Legend: R rows, C columns, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs import QuantizedMatrix
from resmoe_dist.codecs.coders import FACTORS, MARK
from resmoe_dist.codecs.rotation import hadamard_block, signs
from resmoe_dist.kernels.cpu.backend import DTYPES, CpuBackend
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.routing import RoutedTokens

# Entries that the kernels decode at a time: groups are whole steps, or whole projections.
_LEVEL_STEP = 32


class QuantizedCpuBackend(CpuBackend):
    """Quantised residuals, with quantised centres or none.

    `mlp` is one fused kernel as for pruned residuals. Experts with few copies are multiplied in
    whole numbers: tokens, and products of activations with scales, are rounded to 16 bits for
    bfloat16 layers and to 31 for float32. With many copies, rows are decoded to the layer's dtype.
    Either way a centre that is not shared is not rounded before the residual is added.

    `project_in` and `project_out` take rotated tokens and return rotated outputs.
    """

    name = "quantized"

    @classmethod
    def supports(cls, layer: LayerWeights) -> bool:
        return (
            layer.device.type == "cpu"
            and layer.dtype in DTYPES
            and layer.is_stored_as(residual=QuantizedMatrix, center=QuantizedMatrix)
            and all(_is_supported(matrix, layer) for matrix in _matrices(layer))
            and load_kernels()
        )

    def _prepared(self, layer: LayerWeights, activation: str) -> Any:
        is_rotated = _matrices(layer)[0].is_rotated
        size = hadamard_block(layer.hidden) if is_rotated else 1
        return torch.classes.resmoe.Layer.quantized(
            [_prepared_matrix(matrix) for matrix in layer.residuals],
            [_prepared_matrix(matrix) for matrix in layer.centers],
            list(layer.center_of),
            layer.hidden,
            layer.inputs,
            activation,
            signs(layer.hidden) if size > 1 else torch.empty(0),
            size,
            layer.dtype,
        )

    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        rows, columns = out_RC.shape
        coded = self.layer.hidden * (self.layer.inputs + 1)
        here = min(max(coded - first_column, 0), columns)
        if here:
            super().restore(expert, out_RC[:, :here], first_row, first_column)
        if here == columns:
            return
        # Row biases are not coded.
        center = self.layer.center_of[expert]
        first = max(first_column - coded, 0) + coded
        matrices = [self.layer.residuals[expert]]
        matrices += [self.layer.centers[center]] if center >= 0 else []
        bias_RC = torch.zeros(rows, columns - here)
        for matrix in matrices:
            part = matrix.slice_rows(first_row, first_row + rows)
            bias_RC += part.decode_columns(first, columns - here).float()
        out_RC[:, here:] = bias_RC

    def mlp(self, routed: RoutedTokens, *, share_center: bool) -> Tensor:
        if self.is_fused:
            return super().mlp(routed, share_center=share_center)
        x_RH = torch.ops.resmoe.rotate(self._layer, routed.x_RH, False)
        rotated = replace(routed, x_RH=x_RH.to(routed.x_RH.dtype))
        y_RH = super().mlp(rotated, share_center=share_center)
        return torch.ops.resmoe.rotate(self._layer, y_RH, True)


def _matrices(layer: LayerWeights) -> tuple[QuantizedMatrix, ...]:
    matrices = (*layer.residuals, *layer.centers)
    return tuple(matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix))


def _is_supported(matrix: QuantizedMatrix, layer: LayerWeights) -> bool:
    whole_steps = matrix.group % _LEVEL_STEP == 0 or matrix.group >= matrix.hidden
    return (
        whole_steps
        and matrix.hidden == layer.hidden
        and matrix.blocks == layer.inputs + 1
        and matrix.is_rotated == _matrices(layer)[0].is_rotated
    )


def _prepared_matrix(matrix: Any) -> Any:
    return torch.classes.resmoe.QuantizedMatrix(
        matrix.codes,
        matrix.scales,
        matrix.top,
        matrix.coder.name,
        matrix.coder.bits,
        matrix.coder.window,
        matrix.group,
        matrix.hidden,
        matrix.blocks,
        *FACTORS,
        MARK,
    )
