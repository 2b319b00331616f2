"""Tile sizes and other compile-time parameters of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.routing import Copies

ENTRY_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Up to this many copies per job are multiplied elementwise: `tl.dot` needs at least 16.
FEW_COPIES = 2
# Registers hold the sums of this many copies beside a tile of weights.
BLOCK_COPIES = 32
# Programs that fill the largest GPUs. With fewer, the rows of a job are cut into spans; each span
# costs one float32 per copy and column.
PROGRAMS = 2048
SPAN_ROWS = 32


@dataclass(frozen=True)
class Plan:
    """Compile-time parameters of a kernel.

    R, W, M: rows, words of bitmap and copies per step of a program. J: number of jobs, rounded up
    to a power of two. operand: dtype of what `tl.dot` multiplies, None for elementwise products.
    entry: dtype of centres and values. rounds: the layer has centres, so sums of the two are
    rounded. plain_center: the centres' rows are contiguous and aligned to 16 bytes. whole_words:
    the bitmaps' rows are multiples of 4 bytes and aligned to 4 bytes.
    """

    R: int
    W: int
    warps: int
    M: int = 1
    J: int = 1
    operand: tl.dtype | None = None
    entry: tl.dtype = tl.float32
    rounds: bool = False
    plain_center: bool = False
    whole_words: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch. Fusion of products and sums is explicit: its default depends on Triton's
        release."""
        return {"plan": self, "num_warps": self.warps, "enable_fp_fusion": True}

    def with_tile(self, tile: Plan, **changes: Any) -> Plan:
        """The same weights in steps of other sizes."""
        return replace(self, R=tile.R, W=tile.W, warps=tile.warps, **changes)


# One warp per program: no synchronisation; 32 entries per lane keep enough loads in flight.
FEW = Plan(R=4, W=8, warps=1)
MANY_IN = Plan(R=32, W=4, warps=4)
MANY_OUT = Plan(R=16, W=8, warps=4)


def plan_for_layer(layer: LayerWeights) -> Plan:
    """What the weights alone decide, with tiles for few copies."""
    centers = [center.decode() for center in layer.centers]
    bitmaps = [residual.tensors()["bitmap"] for residual in layer.residuals]
    return replace(
        FEW,
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


def plan_for_copies(
    layer_plan: Plan, many: Plan, operand: tl.dtype, copies: Copies, tokens: int
) -> Plan:
    """Tile sizes for a number of copies. How many copies each job has is known on the device only.

    many: tiles for many copies. operand: dtype that `tl.dot` would multiply.
    """
    J = triton.next_power_of_2(copies.num_jobs)
    # Jobs are used unevenly: expect up to twice the mean, but a token goes to a job at most once.
    M = triton.next_power_of_2(min(tokens, triton.cdiv(2 * len(copies), copies.num_jobs)))
    if M <= FEW_COPIES:
        return layer_plan.with_tile(FEW, M=M, J=J)
    M = min(max(M, 16), BLOCK_COPIES)
    return layer_plan.with_tile(many, M=M, J=J, operand=operand)
