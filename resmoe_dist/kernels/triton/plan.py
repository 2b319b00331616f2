"""Tile sizes and other compile-time parameters of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix
from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.kernels.triton.bitmaps import BITMAP_FIELDS
from resmoe_dist.kernels.triton.columns import BITS, OCTET
from resmoe_dist.kernels.triton.streams import STREAM_FIELDS
from resmoe_dist.kernels.triton.tiles import CENTER_FIELDS
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
# Columns and entries of a tile that is rotated, if a block of the rotation has no more.
ROTATED_COLUMNS = 1024
ROTATED_ENTRIES = 4096


@dataclass(frozen=True)
class Plan:
    """Compile-time parameters of a kernel.

    R, W, M: rows, words of 32 columns and copies per step of a program. J: number of jobs, rounded
    up to a power of two. operand: dtype of what `tl.dot` multiplies, None for elementwise products.
    entry: dtype of dense centres and pruned values.

    A job's weights are the sum of: a dense centre, if has_centers; a pruned residual, if
    has_bitmaps; and so many quantised matrices: streams. Jobs may lack the first two. plain_center:
    the dense centres' rows are contiguous and aligned to 16 bytes. whole_words: the bitmaps' rows
    are multiples of 4 bytes and aligned to 4 bytes. rounds: sums are rounded to `entry`.
    """

    R: int
    W: int
    warps: int
    M: int = 1
    J: int = 1
    operand: tl.dtype | None = None
    entry: tl.dtype = tl.float32
    has_centers: bool = True
    has_bitmaps: bool = True
    streams: int = 0
    plain_center: bool = False
    whole_words: bool = False
    rounds: bool = False

    @property
    def X(self) -> int:
        """First axis of a tile's columns: see `columns.py`."""
        return OCTET.value if self.streams else self.W

    @property
    def Y(self) -> int:
        """Second axis of a tile's columns."""
        return self.W * BITS.value // self.X

    @property
    def fields(self) -> int:
        """Numbers in a row of the job table."""
        center = self.has_centers * CENTER_FIELDS.value
        return center + self.has_bitmaps * BITMAP_FIELDS.value + self.streams * STREAM_FIELDS.value

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


def plan_for_pruned(layer: LayerWeights) -> Plan:
    """What the weights alone decide, with tiles for few copies."""
    bitmaps = [residual.tensors()["bitmap"] for residual in layer.residuals]
    return replace(
        FEW,
        entry=ENTRY_TYPES[layer.dtype],
        plain_center=_are_plain(layer.centers),
        rounds=bool(layer.centers),
        whole_words=all(
            number % 4 == 0
            for bitmap in bitmaps
            for number in (bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1])
        ),
    )


def plan_for_quantized(layer: LayerWeights, *, streams: int, has_centers: bool) -> Plan:
    """The same for jobs with so many quantised matrices, and with dense centres or without."""
    return replace(
        FEW,
        entry=ENTRY_TYPES[layer.dtype],
        has_centers=has_centers,
        has_bitmaps=False,
        streams=streams,
        plain_center=has_centers and _are_plain(layer.centers),
    )


def _are_plain(centers: tuple[EncodedMatrix, ...]) -> bool:
    """Whether all dense centres can be read 16 bytes at a time."""
    weights = [center.weight for center in centers if isinstance(center, DenseMatrix)]
    return all(
        weight.stride(1) == 1
        and weight.data_ptr() % 16 == 0
        and weight.stride(0) * weight.itemsize % 16 == 0
        for weight in weights
    )


def plan_for_rotation(layer_plan: Plan, hidden: int, block: int) -> Plan:
    """Tile sizes for rows that are rotated in blocks of columns. Tiles have whole blocks."""
    C = max(block, BITS.value, min(triton.next_power_of_2(hidden), ROTATED_COLUMNS))
    R = max(1, ROTATED_ENTRIES // C)
    # Up to 32 entries per lane.
    warps = min(max(4, R * C // 1024), 16)
    return replace(layer_plan, R=R, W=C // BITS.value, warps=warps)


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
