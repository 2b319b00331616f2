"""A layer's MLP as two products with PyTorch in between: any activation, with row biases.

The reference and the GPU backend always work this way. The CPU backend does where its fused kernel
does not support the layer.

Legend: N routed copies, C centre copies, J jobs (experts or centres), S rows of a block, T tokens,
H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from resmoe_dist.kernels.interface import Backend
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.sharing import CenterCopies
from resmoe_dist.routing import Copies, RoutedTokens

# Which weights a product uses, hence what its jobs are: experts' residuals, experts' centre plus
# residual, or the shared centres.
Part = Literal["residual", "whole", "center"]

# Input products of all copies with one block of rows take at most about this much.
PRODUCT_BYTES = 16 << 20
_LEAST_BLOCK_ROWS = 64


class HalfProductBackend(Backend):
    """A backend that computes `mlp` from an input product and an output product.

    The two products are the backend's own business: callers use `mlp` and `restore`.

    product_bytes: bound on the input products that are held at a time; rows are processed in blocks
    accordingly. rotates_centers: whether part "center" takes and gives rotated vectors, as the
    other parts do if a backend overrides `rotate`.
    """

    rotates_centers = True

    def __init__(self, layer: LayerWeights, product_bytes: int = PRODUCT_BYTES) -> None:
        super().__init__(layer)
        self._product_bytes = product_bytes

    @abstractmethod
    def project_in(self, part: Part, x_TH: Tensor, copies: Copies, rows: slice) -> Tensor:
        """Products of copies with the input columns of some rows of their job.

        Returns [N, inputs·S] in float32; zeros for copies without a job.
        """

    @abstractmethod
    def project_out(
        self, part: Part, h_NS: Tensor, copies: Copies, rows: slice, num_tokens: int
    ) -> Tensor:
        """Products of activations with the output columns, summed per token: [T, H] in float32."""

    def rotate(self, x_TH: Tensor) -> Tensor:
        """Tokens as the products take them, for backends whose weights are rotated."""
        return x_TH

    def rotate_back(self, y_TH: Tensor) -> Tensor:
        """The inverse, for outputs: what the products give, as it leaves the layer."""
        return y_TH

    def sum_for_centers(self, h_NS: Tensor, shared: CenterCopies, copies: Copies) -> Tensor:
        """Sum of the activations over the routed copies that share a centre copy: [C, S].

        copies: the routed ones. Those without a job may be left out: their weight is 0.
        """
        return shared.sum_of(h_NS)

    @torch.no_grad()
    def mlp(self, routed: RoutedTokens, *, share_center: bool) -> Tensor:
        layer, x_RH = self.layer, self.rotate(routed.x_RH)
        center_x_RH = x_RH if self.rotates_centers else routed.x_RH
        shared = CenterCopies.of(routed, layer) if share_center else None
        part: Part = "whole" if shared is None else "residual"
        copies = routed.copies
        y_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        center_y_RH = y_RH if self.rotates_centers else torch.zeros_like(y_RH)
        for rows in self._row_blocks(len(routed.token_N)):
            # 1. Products with the hidden state: per copy, and once per token for shared centres.
            in_NC = self.project_in(part, x_RH, copies, rows)
            if shared is not None:
                shared.add_to(in_NC, self.project_in("center", center_x_RH, shared.copies, rows))
            if layer.shape.row_bias:
                bias_LC = self.row_bias[:, :, rows].flatten(1)
                in_NC += bias_LC[routed.expert_N.clamp(max=layer.num_experts - 1)]
            # 2. The activation, weighted.
            h_NS = layer.activation(*in_NC.chunk(layer.inputs, 1)) * routed.weight_N.unsqueeze(1)
            # 3. Products back: per copy, and for shared centres once per token with the sum.
            y_RH += self.project_out(part, h_NS.to(x_RH.dtype), copies, rows, len(x_RH))
            if shared is not None:
                h_CS = self.sum_for_centers(h_NS, shared, copies).to(x_RH.dtype)
                center_y_RH += self.project_out("center", h_CS, shared.copies, rows, len(x_RH))
        y_RH = self.rotate_back(y_RH)
        return y_RH if self.rotates_centers else y_RH + center_y_RH

    def _row_blocks(self, copies: int) -> Iterator[slice]:
        """All rows; in several blocks if the input products would take much memory."""
        bytes_per_row = max(copies, 1) * self.layer.inputs * 4
        size = max(_LEAST_BLOCK_ROWS, self._product_bytes // bytes_per_row)
        for first in range(0, self.layer.rows, size):
            yield slice(first, min(first + size, self.layer.rows))

    @property
    def prepared_bytes(self) -> int:
        return self.row_bias.nbytes if "row_bias" in vars(self) else 0

    @cached_property
    def row_bias(self) -> Tensor:
        """Biases of the input projections, decoded: [L, inputs, S] in float32.

        Row biases are the last columns of a design matrix.
        """
        layer, inputs = self.layer, self.layer.inputs
        shape = (layer.num_experts, layer.rows, inputs)
        bias_LSi = torch.empty(shape, dtype=layer.dtype, device=layer.device)
        for expert, bias_Si in enumerate(bias_LSi):
            self.restore(expert, bias_Si, first_column=layer.shape.columns - inputs)
        return bias_LSi.transpose(1, 2).float().contiguous()
