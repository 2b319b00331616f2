"""Rows of small integers as streams of bits: packed without gaps, read back at any position.

A row's stream begins at a byte. The least significant bit comes first, in bytes and in integers.

Legend: R rows, N integers of a row, b bits of each, L bits of a window, P bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resmoe_dist.design_matrix import row_ranges

# Entries of a matrix that are processed at a time.
_CHUNK = 1 << 20


def stream_bytes(bits: int) -> int:
    """P for streams of so many bits."""
    return -(-bits // 8)


def pack_stream(prefix_R: Tensor, prefix_bits: int, symbols_RN: Tensor, bits: int) -> Tensor:
    """Streams [R, P] uint8: `prefix_bits` of each prefix, then `bits` of each symbol."""
    chunks = [
        _pack(prefix_R[rows], prefix_bits, symbols_RN[rows], bits)
        for rows in row_chunks(*symbols_RN.shape)
    ]
    return torch.cat(chunks)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with about `_CHUNK` entries each, so that temporaries stay small."""
    return row_ranges(rows, max(1, _CHUNK // max(columns, 1)))


def _pack(prefix_R: Tensor, prefix_bits: int, symbols_RN: Tensor, bits: int) -> Tensor:
    rows = len(symbols_RN)
    parts = []
    if prefix_bits:
        parts.append(_bits_of(prefix_R.view(rows, 1), prefix_bits))
    parts.append(_bits_of(symbols_RN, bits))
    stream = torch.cat(parts, dim=1)
    padding = -stream.shape[1] % 8
    stream = torch.nn.functional.pad(stream, (0, padding)).view(rows, -1, 8)
    powers = (1 << torch.arange(8, device=stream.device)).to(torch.uint8)
    return (stream * powers).sum(2, dtype=torch.uint8)


def read_windows(stream_RP: Tensor, first: int, count: int, bits: int, window: int) -> Tensor:
    """[R, count] int32: the `window` bits from bit (first + i)·bits on, for each i. At most 24."""
    at = (first + torch.arange(count, device=stream_RP.device)) * bits
    byte, shift = at // 8, (at % 8).int()
    # A window ends within the four bytes from its first one on, or past the end of the stream.
    padded = torch.nn.functional.pad(stream_RP, (0, 4))
    word = padded[:, byte].int()
    for i in range(1, -(-(window + 7) // 8)):
        word |= padded[:, byte + i].int() << (8 * i)
    return (word >> shift) & ((1 << window) - 1)


def has_stray_stream_bits(stream_RP: Tensor, bits: int) -> bool:
    """Whether bits after the first `bits` of a row are set."""
    used = bits % 8
    return used > 0 and bool((stream_RP[:, -1] >> used).any())


def _bits_of(numbers_RN: Tensor, bits: int) -> Tensor:
    """[R, N·bits] uint8 of 0 and 1."""
    shifts = torch.arange(bits, device=numbers_RN.device)
    return ((numbers_RN.long().unsqueeze(2) >> shifts) & 1).to(torch.uint8).flatten(1)
