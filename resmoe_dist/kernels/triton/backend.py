"""The GPU backend: launches the Triton kernels.

The table of a layer's addresses is made once. Which blocks of copies there are follows from the
offsets, computed on the device: nothing waits for the host.

Legend: N routed copies, J jobs, K blocks of copies, M copies of a block, S rows, H hidden, R rows
and C columns of an output.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix, PrunedMatrix
from resmoe_dist.kernels.half_products import PRODUCT_BYTES, HalfProductBackend, Part
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.triton import kernels
from resmoe_dist.kernels.triton.kernels import BITS, ENTRY_TYPES, FEW, FIELDS, Plan
from resmoe_dist.routing import Copies


class TritonBackend(HalfProductBackend):
    """Pruned residuals with dense centres.

    Sums over a token's copies are in a fixed order. Tokens and weights of different dtypes are
    multiplied in float32: exact, but without tensor cores.
    """

    name = "triton"

    def __init__(self, layer: LayerWeights, product_bytes: int = PRODUCT_BYTES) -> None:
        super().__init__(layer, product_bytes)
        # By part and first row.
        self._tables: dict[tuple[Part, int], Tensor] = {}
        self._plan = _layer_plan(layer)

    @classmethod
    def supports(cls, layer: LayerWeights) -> bool:
        return (
            layer.device.type == "cuda"
            and layer.dtype in ENTRY_TYPES
            and all(isinstance(residual, PrunedMatrix) for residual in layer.residuals)
            and all(isinstance(center, DenseMatrix) for center in layer.centers)
        )

    @torch.no_grad()
    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        """One program per few rows and 1024 columns."""
        R, columns = out_RC.shape
        if not out_RC.numel():
            return
        plan = replace(self._plan, R=FEW.R, W=FEW.W, warps=FEW.warps)
        table = self._jobs("whole", first_row)[expert]
        column_blocks = triton.cdiv(
            first_column % BITS.value + columns, kernels.RESTORED_COLUMNS.value
        )
        out = (out_RC, R, first_column, first_column + columns, *out_RC.stride())
        with torch.cuda.device_of(out_RC):
            kernels.restore_kernel[triton.cdiv(R, plan.R), column_blocks](
                table, *out, **_compiled(plan)
            )

    def project_in(self, part: Part, x_TH: Tensor, copies: Copies, rows: slice) -> Tensor:
        """One program per block of copies of a job and few rows."""
        S, H, inputs = rows.stop - rows.start, x_TH.shape[1], self.layer.inputs
        out_NC = torch.zeros(len(copies), inputs * S, dtype=torch.float32, device=x_TH.device)
        if not out_NC.numel():
            return out_NC
        plan = self._plan_for(kernels.MANY_IN, x_TH.dtype, len(copies), copies.num_jobs)
        table = self._block_table(part, rows, copies, plan.M)
        x = (x_TH.contiguous(), copies.token_N)
        with torch.cuda.device_of(x_TH):
            kernels.project_in_kernel[len(table), triton.cdiv(S, plan.R)](
                table, *x, out_NC, S, H, inputs, **_compiled(plan)
            )
        return out_NC

    def project_out(
        self, part: Part, h_NS: Tensor, copies: Copies, rows: slice, num_tokens: int
    ) -> Tensor:
        """One program per block of copies of a job, few columns and span of rows; then one program
        per token and columns adds up what they wrote."""
        (N, S), hidden, inputs = h_NS.shape, self.layer.hidden, self.layer.inputs
        out_TH = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=h_NS.device)
        if not (N and S and out_TH.numel()):
            return out_TH
        plan = self._plan_for(kernels.MANY_OUT, h_NS.dtype, N, copies.num_jobs)
        table = self._block_table(part, rows, copies, plan.M)
        column_blocks = triton.cdiv(inputs * hidden % BITS.value + hidden, plan.W * BITS.value)
        programs = len(table) * column_blocks
        spans = min(triton.cdiv(S, kernels.SPAN_ROWS), triton.cdiv(kernels.PROGRAMS, programs))
        span_rows = triton.cdiv(S, spans * plan.R) * plan.R
        P = triton.cdiv(S, span_rows)
        products_NPH = torch.empty(N, P, hidden, dtype=torch.float32, device=h_NS.device)
        # Dropped copies have no products: no token sums them up.
        dropped_N = torch.arange(N, device=h_NS.device) >= copies.offsets_J[-1]
        summed_N = copies.token_N.masked_fill(dropped_N, -1)
        n = triton.next_power_of_2(max(16, min(N, 1024)))
        p = triton.next_power_of_2(min(P, 16))
        # The 8·p·c products that are loaded together fit into the registers.
        c = min(1024 // p, 512)
        h = (h_NS.contiguous(), products_NPH, S, hidden, span_rows, inputs)
        with torch.cuda.device_of(h_NS):
            kernels.project_out_kernel[len(table), column_blocks, P](table, *h, **_compiled(plan))
            kernels.combine_kernel[num_tokens, triton.cdiv(hidden, c)](
                products_NPH, summed_N, out_TH, N, P, hidden, n, p, c, enable_fp_fusion=True
            )
        return out_TH

    def _plan_for(self, many: Plan, dtype: torch.dtype, copies: int, jobs: int) -> Plan:
        """Tile sizes, from the mean number of copies per job: the true ones are on the device."""
        mean = triton.cdiv(copies, jobs)
        plan, M, operand = FEW, triton.next_power_of_2(mean), None
        if M > kernels.FEW_COPIES:
            plan, M = many, min(max(M, 16), kernels.BLOCK_COPIES)
            # Triton's interpreter would multiply the bits of bfloat16 as integers.
            compiled = isinstance(kernels.project_in_kernel, triton.JITFunction)
            same = dtype == self.layer.dtype
            operand = ENTRY_TYPES[dtype] if compiled and same else tl.float32
        sizes = {"R": plan.R, "W": plan.W, "warps": plan.warps, "M": M, "operand": operand}
        return replace(self._plan, **sizes)

    def _jobs(self, part: Part, first_row: int) -> Tensor:
        """[J, FIELDS]: `job_fields` of each job of a part."""
        key = (part, first_row)
        if key not in self._tables:
            layer = self.layer
            centers = [center.decode()[first_row:] for center in layer.centers]
            if part == "center":
                fields = [job_fields(center, None, first_row) for center in centers]
            else:
                fields = [
                    job_fields(
                        centers[center] if center >= 0 and part == "whole" else None,
                        residual,
                        first_row,
                    )
                    for center, residual in zip(layer.center_of, layer.residuals, strict=True)
                ]
            self._tables[key] = torch.tensor(fields, dtype=torch.int64).to(layer.device)
        return self._tables[key]

    def _block_table(self, part: Part, rows: slice, copies: Copies, M: int) -> Tensor:
        """[K, FIELDS]: the job's fields and the copies of each block of at most M copies.

        K is the most blocks that this many copies can make; those that do not exist have 0 copies.
        """
        jobs_JF = self._jobs(part, rows.start)
        offsets_J = copies.offsets_J
        counts_J = offsets_J.diff()
        blocks_J = (counts_J + M - 1) // M
        ends_J = blocks_J.cumsum(0)
        most = min(len(copies), copies.num_jobs + len(copies) // M)
        block_K = torch.arange(most, device=offsets_J.device)
        job_K = torch.searchsorted(ends_J, block_K, right=True).clamp(max=copies.num_jobs - 1)
        first_K = offsets_J[job_K] + (block_K - (ends_J - blocks_J)[job_K]) * M
        copies_K = (offsets_J[job_K + 1] - first_K).clamp(min=0, max=M)
        table_KF = jobs_JF[job_K]
        table_KF[:, FIELDS.value - 2] = first_K
        table_KF[:, FIELDS.value - 1] = copies_K
        return table_KF


def job_fields(
    center_SD: Tensor | None, residual: EncodedMatrix | None, first_row: int
) -> list[int]:
    """What a program needs to know of a job; 0 for what the job lacks.

    Of the centre: 0 address, 1 row stride, 2 column stride, 3 rows. Of the bitmap: 4 address, 5 row
    stride, 6 bytes in a row. Of the values: 7 address. Of the row offsets: 8 address, 9 whether
    int64, 10 rows. Of the block: 11 first copy, 12 copies (filled in per call).
    """
    fields = [0] * FIELDS.value
    if center_SD is not None:
        fields[:4] = center_SD.data_ptr(), *center_SD.stride(), len(center_SD)
    if residual is not None:
        assert isinstance(residual, PrunedMatrix)
        bitmap, values, offsets = residual.bitmap[first_row:], residual.values, residual.row_offsets
        assert bitmap.stride(1) == 1 and values.is_contiguous() and offsets.is_contiguous()
        fields[4:8] = bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1], values.data_ptr()
        wide = offsets.dtype == torch.int64
        fields[8:11] = offsets[first_row:].data_ptr(), wide, len(bitmap)
    return fields


def _layer_plan(layer: LayerWeights) -> Plan:
    """What the weights alone decide."""
    centers = [center.decode() for center in layer.centers]
    bitmaps = [residual.tensors()["bitmap"] for residual in layer.residuals]
    return Plan(
        R=FEW.R,
        W=FEW.W,
        warps=FEW.warps,
        entry=ENTRY_TYPES[layer.dtype],
        rounds=bool(centers),
        plain_center=all(
            center.stride(1) == 1
            and center.data_ptr() % 16 == 0
            and center.stride(0) * center.itemsize % 16 == 0
            for center in centers
        ),
        whole_words=all(
            number % 4 == 0
            for bitmap in bitmaps
            for number in (bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1])
        ),
    )


def _compiled(plan: Plan) -> dict[str, object]:
    """Compile options. Fusion of products and sums is explicit: its default depends on Triton's
    release."""
    return {"plan": plan, "num_warps": plan.warps, "enable_fp_fusion": True}
