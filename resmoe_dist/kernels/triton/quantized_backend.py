"""The GPU backend for quantised residuals, with centres that are quantised, dense or absent.

Rows stay packed, and rotated: the kernels decode them in registers. Tokens are rotated once per
layer on the way in, and outputs once on the way out.

Legend: T tokens, R rows, C columns, H hidden, p size of a Hadamard matrix.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix, QuantizedMatrix
from resmoe_dist.codecs.rotation import hadamard_block, signs
from resmoe_dist.kernels.half_products import PRODUCT_BYTES, Part
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.quantized_layers import (
    are_in_steps,
    quantized_matrices,
    restore_with_biases,
)
from resmoe_dist.kernels.triton import rotation
from resmoe_dist.kernels.triton.backend import TritonBackend
from resmoe_dist.kernels.triton.columns import BITS, OCTET
from resmoe_dist.kernels.triton.plan import (
    ENTRY_TYPES,
    Plan,
    plan_for_quantized,
    plan_for_rotation,
)
from resmoe_dist.kernels.triton.streams import stream_fields
from resmoe_dist.kernels.triton.tiles import center_fields
from resmoe_dist.routing import RoutedTokens


class QuantizedTritonBackend(TritonBackend):
    """Quantised residuals of any bits, with quantised or dense centres or none.

    With few copies, entries are multiplied in float32. With many, they are rounded to the layer's
    dtype for the tensor cores. A centre is not rounded before its residual is added. Rotated tokens
    are rounded to their dtype.

    A dense centre is not rotated, so it cannot be added to rotated rows: it is always shared.
    """

    name = "triton-quantized"

    def __init__(self, layer: LayerWeights, product_bytes: int = PRODUCT_BYTES) -> None:
        super().__init__(layer, product_bytes)
        is_rotated = quantized_matrices(layer)[0].is_rotated
        block = hadamard_block(layer.hidden) if is_rotated else 1
        self._steps = block.bit_length() - 1
        self._signs = signs(layer.hidden).to(layer.device)
        self._restoring = plan_for_rotation(self._plans["whole"], layer.hidden, block)
        self.rotates_centers = not (self._has_dense_centers and self._steps)

    @classmethod
    def supports(cls, layer: LayerWeights) -> bool:
        return (
            layer.device.type == "cuda"
            and layer.dtype in ENTRY_TYPES
            and any(
                layer.is_stored_as(residual=QuantizedMatrix, center=center)
                for center in (QuantizedMatrix, DenseMatrix)
            )
            and are_in_steps(layer, OCTET.value)
        )

    @property
    def prepared_bytes(self) -> int:
        return super().prepared_bytes + self._signs.nbytes

    @property
    def _has_dense_centers(self) -> bool:
        return any(isinstance(center, DenseMatrix) for center in self.layer.centers)

    def _plan_parts(self) -> dict[Part, Plan]:
        dense = self._has_dense_centers
        quantized = int(bool(self.layer.centers) and not dense)
        parts: dict[Part, tuple[int, bool]] = {
            "whole": (1 + quantized, dense),
            "residual": (1, False),
            "center": (quantized, dense),
        }
        return {
            part: plan_for_quantized(self.layer, streams=streams, has_centers=has_centers)
            for part, (streams, has_centers) in parts.items()
        }

    def _job_fields(
        self, part: Part, center: EncodedMatrix | None, residual: EncodedMatrix | None
    ) -> list[int]:
        plan = self._plans[part]
        matrices = [m for m in (residual, center) if isinstance(m, QuantizedMatrix)]
        fields = center_fields(center) if plan.has_centers else []
        for i in range(plan.streams):
            fields += stream_fields(matrices[i] if i < len(matrices) else None)
        return fields

    def mlp(self, routed: RoutedTokens, *, share_center: bool) -> Tensor:
        return super().mlp(routed, share_center=share_center or not self.rotates_centers)

    def rotate(self, x_TH: Tensor) -> Tensor:
        return self._rotated(x_TH, back=False)

    def rotate_back(self, y_TH: Tensor) -> Tensor:
        return self._rotated(y_TH, back=True)

    def _rotated(self, x_TH: Tensor, *, back: bool) -> Tensor:
        """One program per token and columns."""
        if not (self._steps and x_TH.numel()):
            return x_TH
        (T, H), C = x_TH.shape, self._restoring.W * BITS.value
        out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(x_TH):
            rotation.rotate_kernel[T, triton.cdiv(H, C)](
                x_TH.contiguous(),
                self._signs,
                out_TH,
                H,
                back,
                self._steps,
                C,
                num_warps=max(1, C // 1024),
                enable_fp_fusion=True,
            )
        return out_TH

    @torch.no_grad()
    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        restore_with_biases(
            self._restore_entries, self.layer, expert, out_RC, first_row, first_column
        )

    def _restore_entries(
        self, expert: int, out_RC: Tensor, first_row: int, first_column: int
    ) -> None:
        """One program per few rows and columns of a projection."""
        (R, columns), H, plan = out_RC.shape, self.layer.hidden, self._restoring
        if not out_RC.numel():
            return
        grid = (
            triton.cdiv(R, plan.R),
            triton.cdiv(H, plan.W * BITS.value),
            self.layer.inputs + 1,
        )
        out = (out_RC, first_row, R, H, first_column, first_column + columns, *out_RC.stride())
        with torch.cuda.device_of(out_RC):
            rotation.restore_quantized_kernel[grid](
                self._tables["whole"], expert, self._signs, *out, self._steps, **plan.options
            )
