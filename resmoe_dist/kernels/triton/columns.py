"""The columns of a tile: counted in words of 32, on two axes.

A lane of a warp should hold what it decodes together in its own registers, and the lanes should
read neighbours. So the columns of a tile have two axes, of which registers take the first:

    bitmaps   the words, and the 32 bits of a word
    streams   the 8 entries of an octet, and the octets

Legend: of a tile: W words, X and Y its two axes of columns, C = 32·W = X·Y columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(32)
# Entries of a stream that are decoded together.
OCTET = tl.constexpr(8)


@triton.jit
def _origin(low, plan: tl.constexpr):
    """The column from which words are counted, for the projection that begins at `low`.

    Bitmaps are read in whole words from the row's first column on, so a projection may begin in the
    middle of a word. Entries of streams are read from the projection's first on: those that share a
    scale are counted from there.
    """
    if plan.streams:
        return low
    else:
        return 0


@triton.jit
def word_range(low, high, plan: tl.constexpr):
    """The words that hold columns [low, high): the first, and the one after the last."""
    origin = _origin(low, plan)
    return (low - origin) // BITS, tl.cdiv(high - origin, BITS)


@triton.jit
def tile_columns(word, low, high, plan: tl.constexpr):
    """The columns [X, Y] of the tile that begins with a word, counted from `low`, and whether they
    are in [low, high)."""
    x_X = tl.arange(0, plan.X)
    y_Y = tl.arange(0, plan.Y)
    if plan.streams:
        column_XY = x_X[:, None] + y_Y[None, :] * OCTET
    else:
        column_XY = x_X[:, None] * BITS + y_Y[None, :]
    column_XY += word * BITS + _origin(low, plan)
    return column_XY - low, (column_XY >= low) & (column_XY < high)
