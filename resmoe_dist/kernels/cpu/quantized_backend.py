"""The CPU backend for quantised centres and residuals.

Rows stay packed, and rotated: the kernels decode them in registers. Tokens are rotated once per
layer on the way in, and outputs once on the way out.

Legend: R rows, C columns, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs import QuantizedMatrix
from resmoe_dist.codecs.coders import FACTORS, MARK
from resmoe_dist.codecs.rotation import hadamard_block, signs
from resmoe_dist.kernels.cpu.backend import DTYPES, CpuBackend
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.quantized_layers import (
    are_in_steps,
    quantized_matrices,
    restore_with_biases,
)

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
            and are_in_steps(layer, _LEVEL_STEP)
            and load_kernels()
        )

    def _prepared(self, layer: LayerWeights, activation: str) -> Any:
        is_rotated = quantized_matrices(layer)[0].is_rotated
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
        restore_with_biases(super().restore, self.layer, expert, out_RC, first_row, first_column)

    def rotate(self, x_TH: Tensor) -> Tensor:
        return torch.ops.resmoe.rotate(self._layer, x_TH, False).to(x_TH.dtype)

    def rotate_back(self, y_TH: Tensor) -> Tensor:
        return torch.ops.resmoe.rotate(self._layer, y_TH, True)


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
