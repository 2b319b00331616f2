"""Tiles of weights: a job's rows, read as dense centre plus encoded matrices.

Legend: S rows of a shard, D columns; of a tile: R rows, X and Y its columns (see
`columns.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix
from resmoe_dist.kernels.triton.bitmaps import load_kept, open_bitmap
from resmoe_dist.kernels.triton.columns import tile_columns
from resmoe_dist.kernels.triton.streams import STREAM_FIELDS, load_entries, open_stream

# Numbers that describe a dense centre: see `center_fields`.
CENTER_FIELDS = tl.constexpr(4)


def center_fields(center: EncodedMatrix | None) -> list[int]:
    """0 address, 1 row stride, 2 column stride, 3 whether there is one; zeros for no centre."""
    if center is None:
        return [0] * CENTER_FIELDS.value
    assert isinstance(center, DenseMatrix)
    return [center.weight.data_ptr(), *center.weight.stride(), True]


@triton.jit
def _open_center(center, row_R, plan: tl.constexpr):
    """Some rows of a dense centre, for `load_center`. center: the numbers of `center_fields`."""
    address = tl.load(center).to(tl.pointer_type(plan.entry))
    row_stride = tl.load(center + 1)
    column_stride = tl.load(center + 2)
    if plan.plain_center:
        address = tl.multiple_of(address, 16)
        row_stride = tl.multiple_of(row_stride, 128 // plan.entry.primitive_bitwidth)
        column_stride = 1
    return tl.load(center + 3) > 0, address + row_R.to(tl.int64) * row_stride, column_stride


@triton.jit
def open_rows(job, row_R, held_R, word, plan: tl.constexpr):
    """Some rows of a job, for `load_weights`, and ahead_R: where the values of word `word` begin.

    job: a row of the job table. row_R: rows of the job's tensors. held_R: which of them to read.
    The rows are held_R, and of each matrix that a job's weights are the sum of: a dense centre, a
    bitmap, two streams; None for what the plan leaves out.
    """
    center, bitmap, stream, other_stream = None, None, None, None
    ahead_R = tl.zeros_like(row_R)
    if plan.has_centers:
        center = _open_center(job, row_R, plan)
        job += CENTER_FIELDS
    if plan.has_bitmaps:
        bitmap, ahead_R = open_bitmap(job, row_R, held_R, word, plan)
    if plan.streams > 0:
        stream = open_stream(job, row_R, held_R)
    if plan.streams > 1:
        other_stream = open_stream(job + STREAM_FIELDS, row_R, held_R)
    return (held_R, center, bitmap, stream, other_stream), ahead_R


@triton.jit
def load_center(rows, low, column_XY, inside_XY):
    """Entries [R, X, Y] of a job's dense centre, float32; zero without a centre, and outside.

    column_XY: columns, counted from `low`. inside_XY: which of them to read.
    """
    held_R, (has_center, center_R, column_stride) = rows[0], rows[1]
    mask_RXY = held_R[:, None, None] & inside_XY[None, :, :]
    center_RXY = tl.zeros(mask_RXY.shape, tl.float32)
    if has_center:
        pointer_RXY = center_R[:, None, None] + ((column_XY + low) * column_stride)[None, :, :]
        center_RXY = tl.load(pointer_RXY, mask=mask_RXY, other=0.0).to(tl.float32)
    return center_RXY


@triton.jit
def load_streams(rows, word, low, plan: tl.constexpr):
    """Sum [R, X, Y] of a job's quantised matrices: see `load_entries`."""
    sum_RXY = tl.zeros([plan.R, plan.X, plan.Y], tl.float32)
    if plan.streams > 0:
        sum_RXY += load_entries(rows[3], word, low, plan)
    if plan.streams > 1:
        sum_RXY += load_entries(rows[4], word, low, plan)
    return sum_RXY


@triton.jit
def load_weights(rows, ahead_R, word, low, high, plan: tl.constexpr):
    """Centre + residual [R, X, Y] of the tile that begins with a word, in float32.

    Columns outside of [low, high) are zero, or any finite number if matrices are quantised.
    ahead_R: where the word's values begin. Returns that of the word after the tile as well.
    """
    column_XY, inside_XY = tile_columns(word, low, high, plan)
    weights_RXY = load_streams(rows, word, low, plan)
    if plan.has_centers:
        weights_RXY += load_center(rows, low, column_XY, inside_XY)
    if plan.has_bitmaps:
        kept_RXY, ahead_R = load_kept(rows[2], ahead_R, word, inside_XY, high, plan)
        weights_RXY += kept_RXY
    if plan.rounds:
        weights_RXY = weights_RXY.to(plan.entry).to(tl.float32)
    return weights_RXY, ahead_R
