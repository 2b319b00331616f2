"""The rotation of the hidden dimension that makes the entries of a matrix Gaussian.

Codes are built for Gaussian entries, and a few large ones would spoil the scale of all others. A
Hadamard transform with random signs spreads them (QuIP#, arXiv:2402.04396, section 3). The same
orthogonal Q multiplies each projection of a design matrix along its hidden dimension:

    W = W' Q in each block of H columns, so W x = W' (Q x) and hᵀ W = (hᵀ W') Q

Permutations of rows, centres and row shards commute with it, so one Q serves all experts of a
model, and a token is rotated once per layer.

Q is block diagonal: the Hadamard matrix of the largest power of two that divides H, repeated.

Legend: H hidden, p size of a Hadamard matrix.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Smaller blocks average too few entries to be worth it.
_LEAST_BLOCK = 16


def hadamard_block(hidden: int) -> int:
    """p: the largest power of two that divides H; 1, which is no rotation, if that is small."""
    block = hidden & -hidden
    return block if block >= _LEAST_BLOCK else 1


def rotate(x: Tensor) -> Tensor:
    """Q x for the last dimension [..., H], in float32."""
    block = hadamard_block(x.shape[-1])
    if block == 1:
        return x.float()
    return _hadamard(x.float() * signs(x.shape[-1]).to(x.device), block)


def rotate_back(x: Tensor) -> Tensor:
    """Qᵀ x for the last dimension [..., H], in float32: the inverse of `rotate`."""
    block = hadamard_block(x.shape[-1])
    if block == 1:
        return x.float()
    return _hadamard(x.float(), block) * signs(x.shape[-1]).to(x.device)


def _hadamard(x: Tensor, block: int) -> Tensor:
    """The symmetric, orthogonal Hadamard transform of every `block` entries, by butterflies."""
    shape = x.shape
    x = x.reshape(-1, block)
    half = 1
    while half < block:
        pairs = x.view(-1, block // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([first + second, first - second], dim=2).view(-1, block)
        half *= 2
    return (x * block**-0.5).view(shape)


@lru_cache(maxsize=16)
def signs(hidden: int) -> Tensor:
    """[H] of ±1, the same on every machine: a hash of the position (MurmurHash3's finaliser)."""
    mixed = torch.arange(1, hidden + 1, dtype=torch.int64) * 0x9E3779B9 & 0xFFFFFFFF
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return 1.0 - 2.0 * (mixed >> 31).float()
