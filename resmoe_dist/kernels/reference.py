"""The reference backend: plain PyTorch, every codec. Tests compare all other backends with it.

Legend: L local experts, N routed copies, n copies of one job, J jobs, S rows, H hidden, R rows and
C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix
from resmoe_dist.kernels.half_products import HalfProductBackend, Part
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.routing import Copies

# The activations that fused kernels support, and what they compute.
FUSED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ReferenceBackend(HalfProductBackend):
    """One job after the other. Reads the offsets on the host."""

    name = "reference"

    @classmethod
    def supports(cls, layer: LayerWeights) -> bool:
        return True

    @torch.no_grad()
    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        end_row = first_row + out_RC.shape[0]
        center = self.layer.center_of[expert]
        out_RC.zero_()
        if center >= 0:
            self.layer.centers[center].slice_rows(first_row, end_row).add_to(out_RC, first_column)
        self.layer.residuals[expert].slice_rows(first_row, end_row).add_to(out_RC, first_column)

    def project_in(self, part: Part, x_TH: Tensor, copies: Copies, rows: slice) -> Tensor:
        H, S = x_TH.shape[1], rows.stop - rows.start
        inputs = self.layer.inputs
        out_NC = torch.zeros(len(copies), inputs * S, dtype=torch.float32, device=x_TH.device)
        for matrix, n in self._jobs(part, copies, rows):
            x_nH = x_TH[copies.token_N[n]]
            for i in range(inputs):
                out_NC[n, i * S : (i + 1) * S] = matrix.multiply(x_nH, i * H)
        return out_NC

    def project_out(
        self, part: Part, h_NS: Tensor, copies: Copies, rows: slice, num_tokens: int
    ) -> Tensor:
        hidden, first_column = self.layer.hidden, self.layer.inputs * self.layer.hidden
        out_TH = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=h_NS.device)
        for matrix, n in self._jobs(part, copies, rows):
            out_TH.index_add_(
                0, copies.token_N[n], matrix.multiply_back(h_NS[n], first_column, hidden)
            )
        return out_TH

    def _jobs(
        self, part: Part, copies: Copies, rows: slice
    ) -> Iterator[tuple[EncodedMatrix, slice]]:
        """Some rows of each job that has copies, and which copies those are."""
        offsets = copies.offsets_J.tolist()
        for job, (begin, end) in enumerate(pairwise(offsets)):
            if begin < end:
                yield self._rows_of(part, job, rows), slice(begin, end)

    def _rows_of(self, part: Part, job: int, rows: slice) -> EncodedMatrix:
        if part == "center":
            return self.layer.centers[job].slice_rows(rows.start, rows.stop)
        if part == "residual" or self.layer.center_of[job] < 0:
            return self.layer.residuals[job].slice_rows(rows.start, rows.stop)
        columns = self.layer.residuals[job].columns
        dense_SD = torch.empty(
            rows.stop - rows.start, columns, dtype=self.layer.dtype, device=self.layer.device
        )
        self.restore(job, dense_SD, rows.start)
        return DenseMatrix.of(dense_SD)
