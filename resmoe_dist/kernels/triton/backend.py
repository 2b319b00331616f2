"""The GPU backend: launches the Triton kernels.

Everything about the weights is prepared once. What depends on the tokens (which copies belong to
which expert) stays on the device: no call waits for it.

Legend: N routed copies, C centre copies, J jobs, T tokens, S rows, H hidden, P spans of rows, M
copies of a block; R rows and C columns of an output.
"""

from __future__ import annotations

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix, PrunedMatrix
from resmoe_dist.kernels.half_products import PRODUCT_BYTES, HalfProductBackend, Part
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.sharing import CenterCopies
from resmoe_dist.kernels.triton import kernels
from resmoe_dist.kernels.triton.bitmaps import bitmap_fields
from resmoe_dist.kernels.triton.columns import BITS
from resmoe_dist.kernels.triton.plan import (
    ENTRY_TYPES,
    FEW,
    MANY_IN,
    MANY_OUT,
    PROGRAMS,
    SPAN_ROWS,
    Plan,
    plan_for_copies,
    plan_for_pruned,
)
from resmoe_dist.kernels.triton.tiles import center_fields
from resmoe_dist.routing import Copies


class TritonBackend(HalfProductBackend):
    """Pruned residuals with dense centres.

    Sums are in a fixed order. Tokens and weights of different dtypes are multiplied in float32:
    exact, but without tensor cores.
    """

    name = "triton"

    def __init__(self, layer: LayerWeights, product_bytes: int = PRODUCT_BYTES) -> None:
        super().__init__(layer, product_bytes)
        self._plans = self._plan_parts()
        self._tables = {part: self._table(part) for part in self._plans}

    @classmethod
    def supports(cls, layer: LayerWeights) -> bool:
        return (
            layer.device.type == "cuda"
            and layer.dtype in ENTRY_TYPES
            and layer.is_stored_as(residual=PrunedMatrix, center=DenseMatrix)
        )

    def _plan_parts(self) -> dict[Part, Plan]:
        """What the weights alone decide of each part's kernels."""
        return dict.fromkeys(get_args(Part), plan_for_pruned(self.layer))

    def _job_fields(
        self, part: Part, center: EncodedMatrix | None, residual: EncodedMatrix | None
    ) -> list[int]:
        """A row of a part's job table. None for what the job lacks."""
        assert residual is None or isinstance(residual, PrunedMatrix)
        return [*center_fields(center), *bitmap_fields(residual)]

    @torch.no_grad()
    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        """One program per few rows and 1024 columns."""
        R, columns = out_RC.shape
        if not out_RC.numel():
            return
        column_blocks = triton.cdiv(
            first_column % BITS.value + columns, kernels.RESTORED_COLUMNS.value
        )
        out = (out_RC, first_row, R, first_column, first_column + columns, *out_RC.stride())
        with torch.cuda.device_of(out_RC):
            kernels.restore_kernel[triton.cdiv(R, FEW.R), column_blocks](
                self._tables["whole"], expert, *out, **self._plans["whole"].options
            )

    def project_in(self, part: Part, x_TH: Tensor, copies: Copies, rows: slice) -> Tensor:
        """One program per block of copies of a job and few rows."""
        S, (T, H), inputs = rows.stop - rows.start, x_TH.shape, self.layer.inputs
        out_NC = torch.zeros(len(copies), inputs * S, dtype=torch.float32, device=x_TH.device)
        if not out_NC.numel():
            return out_NC
        plan = plan_for_copies(self._plans[part], MANY_IN, self._operand(x_TH.dtype), copies, T)
        jobs = (self._tables[part], copies.offsets_J.contiguous(), copies.num_jobs)
        x = (x_TH.contiguous(), copies.token_N.contiguous(), out_NC, rows.start, S, H, inputs)
        grid = (_num_blocks(plan, copies), triton.cdiv(S, plan.R))
        with torch.cuda.device_of(x_TH):
            kernels.project_in_kernel[grid](*jobs, *x, **plan.options)
        return out_NC

    def project_out(
        self, part: Part, h_NS: Tensor, copies: Copies, rows: slice, num_tokens: int
    ) -> Tensor:
        """One program per block of copies of a job, few columns and span of rows; then one program
        per token and columns adds up what they wrote."""
        (N, S), H, inputs = h_NS.shape, self.layer.hidden, self.layer.inputs
        if not (N and S):
            return torch.zeros(num_tokens, H, dtype=torch.float32, device=h_NS.device)
        operand = self._operand(h_NS.dtype)
        plan = plan_for_copies(self._plans[part], MANY_OUT, operand, copies, num_tokens)
        blocks = _num_blocks(plan, copies)
        column_blocks = triton.cdiv(inputs * H % BITS.value + H, plan.W * BITS.value)
        spans = min(triton.cdiv(S, SPAN_ROWS), triton.cdiv(PROGRAMS, blocks * column_blocks))
        span_rows = triton.cdiv(S, spans * plan.R) * plan.R
        P = triton.cdiv(S, span_rows)
        products_NPH = torch.empty(N, P, H, dtype=torch.float32, device=h_NS.device)
        jobs = (self._tables[part], copies.offsets_J.contiguous(), copies.num_jobs)
        h = (h_NS.contiguous(), products_NPH, rows.start, S, H, span_rows, inputs)
        with torch.cuda.device_of(h_NS):
            kernels.project_out_kernel[blocks, column_blocks, P](*jobs, *h, **plan.options)
        return _combine(products_NPH, copies.token_N, copies, num_tokens)

    def sum_for_centers(self, h_NS: Tensor, shared: CenterCopies, copies: Copies) -> Tensor:
        return _combine(h_NS.unsqueeze(1), shared.index_N, copies, len(shared.copies))

    def _table(self, part: Part) -> Tensor:
        """[J, fields]: where the matrices of a part's jobs are."""
        layer = self.layer
        experts = zip(layer.center_of, layer.residuals, strict=True)
        jobs: dict[Part, list[tuple[EncodedMatrix | None, EncodedMatrix | None]]] = {
            "whole": [(layer.centers[i] if i >= 0 else None, matrix) for i, matrix in experts],
            "residual": [(None, residual) for residual in layer.residuals],
            "center": [(center, None) for center in layer.centers],
        }
        rows = [self._job_fields(part, *job) for job in jobs[part]]
        return torch.tensor(rows, dtype=torch.int64).to(layer.device)

    def _operand(self, dtype: torch.dtype) -> tl.dtype:
        """What `tl.dot` multiplies, for tokens of a dtype."""
        # Triton's interpreter would multiply the bits of bfloat16 as integers.
        compiled = isinstance(kernels.project_in_kernel, triton.JITFunction)
        return ENTRY_TYPES[dtype] if compiled and dtype == self.layer.dtype else tl.float32


def _num_blocks(plan: Plan, copies: Copies) -> int:
    """Numbers that blocks of copies may have, however the copies are distributed over jobs."""
    return (len(copies) + copies.num_jobs * (plan.M - 1)) // plan.M


def _combine(products_NPH: Tensor, token_N: Tensor, copies: Copies, num_tokens: int) -> Tensor:
    """Sum of each token's products, over the copies that have a job and over spans: [T, H]."""
    N, P, H = products_NPH.shape
    out_TH = torch.empty(num_tokens, H, dtype=torch.float32, device=products_NPH.device)
    if not out_TH.numel():
        return out_TH
    n = triton.next_power_of_2(max(16, min(N, 1024)))
    p = triton.next_power_of_2(min(P, 16))
    # The 8·p·c products that are loaded together fit into the registers.
    c = min(1024 // p, 512)
    jobs = (token_N.contiguous(), copies.offsets_J.contiguous(), copies.num_jobs)
    with torch.cuda.device_of(out_TH):
        kernels.combine_kernel[num_tokens, triton.cdiv(H, c)](
            products_NPH.contiguous(), *jobs, out_TH, P, H, n, p, c, enable_fp_fusion=True
        )
    return out_TH
