"""Words of 32 columns: how kernels count the columns of a projection.

A word is what a tile reads at a time: 32 bits of a bitmap, or 32 entries of a stream.

Legend: W words, B = 32 columns of a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(32)


@triton.jit
def _origin(low, plan: tl.constexpr):
    """The column from which words are counted, for the projection that begins at `low`.

    Bitmaps are read in whole words from the row's first column on, so a projection may begin in the
    middle of a word. Entries of streams are read from the projection's first on: those that share a
    scale are counted from there.
    """
    if plan.is_quantized:
        return low
    else:
        return 0


@triton.jit
def word_range(low, high, plan: tl.constexpr):
    """The words that hold columns [low, high): the first, and the one after the last."""
    origin = _origin(low, plan)
    return (low - origin) // BITS, tl.cdiv(high - origin, BITS)


@triton.jit
def word_columns(word_W, low, high, plan: tl.constexpr):
    """Column [W, B] of each bit of some words, counted from `low`, and whether in [low, high)."""
    column_WB = word_W[:, None] * BITS + tl.arange(0, BITS)[None, :] + _origin(low, plan)
    return column_WB - low, (column_WB >= low) & (column_WB < high)
