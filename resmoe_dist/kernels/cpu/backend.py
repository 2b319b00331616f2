"""The CPU backend: C++ kernels for bfloat16 and float32, built on first use.

Legend: N routed copies, J jobs, S rows, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, PrunedMatrix
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.kernels.half_products import PRODUCT_BYTES, HalfProductBackend, Part
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.sharing import CenterCopies
from resmoe_dist.routing import Copies, RoutedTokens

DTYPES = (torch.bfloat16, torch.float32)


class CpuBackend(HalfProductBackend):
    """Pruned residuals with dense centres; the sum of the two never reaches memory.

    `mlp` is one fused kernel for the activations of `reference.FUSED_ACTIVATIONS` without row
    biases, two products otherwise. With so many tokens that the sums of all threads would exceed
    64 MB, the fused kernel adds shared centres to the residuals instead, rounded as in `restore`.
    """

    name = "cpu"

    def __init__(self, layer: LayerWeights, product_bytes: int = PRODUCT_BYTES) -> None:
        super().__init__(layer, product_bytes)
        fused = layer.activation.kernel if not layer.shape.row_bias else None
        # Checked and packed once: a call passes one object, not lists of tensors.
        self._layer = self._prepared(layer, fused or "")
        # Whether `mlp` is one fused kernel.
        self.is_fused = fused is not None

    def _prepared(self, layer: LayerWeights, activation: str) -> Any:
        """The layer as the kernels take it. activation: "" if `mlp` is not one fused kernel."""
        residuals = [residual.tensors() for residual in layer.residuals]
        return torch.classes.resmoe.Layer(
            *([tensors[name] for tensors in residuals] for name in PrunedMatrix.stored),
            [center.decode() for center in layer.centers],
            list(layer.center_of),
            layer.hidden,
            layer.inputs,
            activation,
        )

    @classmethod
    def supports(cls, layer: LayerWeights) -> bool:
        return (
            layer.device.type == "cpu"
            and layer.dtype in DTYPES
            and layer.is_stored_as(residual=PrunedMatrix, center=DenseMatrix)
            and load_kernels()
        )

    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        torch.ops.resmoe.restore(self._layer, expert, out_RC, first_row, first_column)

    def mlp(self, routed: RoutedTokens, *, share_center: bool) -> Tensor:
        if not self.is_fused:
            return super().mlp(routed, share_center=share_center)
        shared = CenterCopies.of(routed, self.layer) if share_center else None
        centers: tuple[Tensor | None, ...] = (None, None, None)
        if shared is not None:
            centers = (shared.copies.token_N, shared.copies.offsets_J, shared.index_N)
        return torch.ops.resmoe.mlp(
            self._layer,
            routed.x_RH,
            routed.token_N,
            routed.weight_N,
            routed.offsets_L,
            *centers,
        )

    def project_in(self, part: Part, x_TH: Tensor, copies: Copies, rows: slice) -> Tensor:
        size = rows.stop - rows.start
        return torch.ops.resmoe.project_in(
            self._layer, part, x_TH, copies.token_N, copies.offsets_J, rows.start, size
        )

    def project_out(
        self, part: Part, h_NS: Tensor, copies: Copies, rows: slice, num_tokens: int
    ) -> Tensor:
        return torch.ops.resmoe.project_out(
            self._layer, part, h_NS, copies.token_N, copies.offsets_J, rows.start, num_tokens
        )


def instruction_sets() -> list[str]:
    """Instruction sets that kernels exist for and this machine supports, fastest first."""
    return torch.ops.resmoe.instruction_sets()


def use_instruction_set(name: str) -> None:
    """Force an instruction set, for tests and benchmarks. RuntimeError if it is not supported."""
    torch.ops.resmoe.use_instruction_set(name)
