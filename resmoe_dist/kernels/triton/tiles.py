"""Tiles of weights: a job's rows, read as dense centre plus encoded matrices.

Legend: S rows of a shard, D columns; of a tile: R rows, W words, B = 32 columns of a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix
from resmoe_dist.kernels.triton.bitmaps import load_kept, open_bitmap
from resmoe_dist.kernels.triton.streams import STREAM_FIELDS, load_entries, open_stream
from resmoe_dist.kernels.triton.words import word_columns

# Numbers that describe a dense centre: see `center_fields`.
CENTER_FIELDS = tl.constexpr(4)


def center_fields(center: EncodedMatrix | None) -> list[int]:
    """0 address, 1 row stride, 2 column stride, 3 whether there is one; zeros for no centre."""
    if center is None:
        return [0] * CENTER_FIELDS.value
    assert isinstance(center, DenseMatrix)
    return [center.weight.data_ptr(), *center.weight.stride(), True]


@triton.jit
def open_center(job, row_R, plan: tl.constexpr):
    """Some rows of a job's dense centre, for `load_center`."""
    center = tl.load(job).to(tl.pointer_type(plan.entry))
    row_stride = tl.load(job + 1)
    column_stride = tl.load(job + 2)
    if plan.plain_center:
        center = tl.multiple_of(center, 16)
        row_stride = tl.multiple_of(row_stride, 128 // plan.entry.primitive_bitwidth)
        column_stride = 1
    return tl.load(job + 3) > 0, center + row_R.to(tl.int64) * row_stride, column_stride


@triton.jit
def load_center(center, low, column_WB, mask_RWB):
    """Entries [R, W, B] of a centre, in float32; zero where masked, and without a centre.

    column_WB: columns, counted from `low`.
    """
    has_center, center_R, column_stride = center
    center_RWB = tl.zeros(mask_RWB.shape, tl.float32)
    if has_center:
        pointer_RWB = center_R[:, None, None] + ((column_WB + low) * column_stride)[None, :, :]
        center_RWB = tl.load(pointer_RWB, mask=mask_RWB, other=0.0).to(tl.float32)
    return center_RWB


@triton.jit
def open_rows(job, row_R, held_R, word, plan: tl.constexpr):
    """Some rows of a job, for `load_weights`, and where the values of word `word` begin: `ahead_R`.

    job: a row of the job table. row_R: rows of the job's tensors. held_R: which of them to read.
    """
    center = open_center(job, row_R, plan)
    matrix = job + CENTER_FIELDS
    if plan.is_quantized:
        residual = open_stream(matrix, row_R, held_R)
        coded_center = open_stream(matrix + STREAM_FIELDS, row_R, held_R)
        return (held_R, center, residual, coded_center), tl.zeros_like(row_R)
    else:
        residual, ahead_R = open_bitmap(matrix, row_R, held_R, word, plan)
        return (held_R, center, residual), ahead_R


@triton.jit
def load_weights(rows, ahead_R, word_W, low, high, plan: tl.constexpr):
    """Centre + residual [R, W, B] at the columns of some words, in float32.

    Columns outside of [low, high) are zero, or any finite number if the matrices are quantised.
    ahead_R: where the words' values begin. Returns that of the words after them as well.
    """
    column_WB, inside_WB = word_columns(word_W, low, high, plan)
    mask_RWB = rows[0][:, None, None] & inside_WB[None, :, :]
    weights_RWB = load_center(rows[1], low, column_WB, mask_RWB)
    if plan.is_quantized:
        weights_RWB += load_entries(rows[2], word_W, low)
        weights_RWB += load_entries(rows[3], word_W, low)
    else:
        kept_RWB, ahead_R = load_kept(rows[2], ahead_R, word_W, inside_WB, high, plan)
        weights_RWB += kept_RWB
        if plan.rounds:
            weights_RWB = weights_RWB.to(plan.entry).to(tl.float32)
    return weights_RWB, ahead_R
