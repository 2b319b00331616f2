"""Encoding groups in tests: defaults, weights, and what the stored tensors restore.

Legend: E experts, I rows, D columns.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes, EntryWeights
from resmoe_dist.compression.encoding import Encoded, GroupCodecs, encode_group
from tests.compression.center_cases import in_stored_order, random_weights, weight_matrix

DEFAULT_SIZES = BlockSizes()
every_center = pytest.mark.parametrize("center", ["none", "barycenter", "joint"])
every_allocation = pytest.mark.parametrize("allocate", ["expert", "group"])
every_codec_and_center = pytest.mark.parametrize(
    ("codec", "center"),
    [
        *(("pruned", name) for name in ("joint", "barycenter", "mean", "none")),
        *(("low_rank", name) for name in ("joint", "barycenter", "none")),
        ("dense", "none"),
    ],
)


def codec_spec(name: str, keep: float) -> CodecSpec:
    """A codec, with `keep` if it has a budget."""
    spec = CodecSpec(name=name)
    return spec if spec.keep is None else spec.with_keep(keep)


def encode(
    experts: Tensor | AlignedExperts,
    codec: str = "pruned",
    *,
    center: str = "joint",
    center_codec: str = "dense",
    keep: float = 0.25,
    allocate: str = "group",
    dtype: torch.dtype = torch.float32,
    weights: EntryWeights | None = None,
    sizes: BlockSizes = DEFAULT_SIZES,
) -> Encoded:
    """Encode a group. Experts given as a tensor [E, I, D] are in aligned order."""
    if isinstance(experts, Tensor):
        experts = in_stored_order(experts, weights, sizes)
    codecs = GroupCodecs(codec_spec(codec, keep), dtype, codec_spec(center_codec, keep))
    return encode_group(experts, codecs, center=center, allocate=allocate)


def center_of(encoded: Encoded) -> np.ndarray | float:
    """The stored centre [I, D] in float64; 0 without one."""
    return 0.0 if encoded.center is None else encoded.center.decode().double().numpy()


def restored(encoded: Encoded) -> np.ndarray:
    """The experts that the stored tensors restore, [E, I, D] in float64."""
    center = center_of(encoded)
    return np.stack([center + r.decode().double().numpy() for r in encoded.residuals])


def kept_entries(encoded: Encoded) -> list[int]:
    """Stored values of each residual of codec `pruned`."""
    return [residual.values.numel() for residual in encoded.residuals]


def stored_bytes(encoded: Encoded) -> int:
    """Bytes of the centre and all residuals."""
    center = 0 if encoded.center is None else encoded.center.nbytes
    return center + sum(residual.nbytes for residual in encoded.residuals)


def weights_and_matrix(rows: int, columns: int) -> tuple[EntryWeights, np.ndarray]:
    """Random weights, a third of the columns those of the output, and their matrix [I, D]."""
    weights = random_weights(rows, columns, slice(columns - columns // 3, columns))
    return weights, weight_matrix(weights).double().numpy()


@st.composite
def groups(draw: st.DrawFn) -> Tensor:
    """Groups of any shape and scale, some with equal experts, equal values or rows of zeros."""
    count, rows, columns = (draw(st.integers(1, largest)) for largest in (5, 9, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    experts = torch.randn(count, rows, columns, generator=generator)
    if draw(st.booleans()):
        experts = experts.round()
    if count > 1 and draw(st.booleans()):
        # Equal up to the order of their rows.
        experts[-1] = experts[0][torch.randperm(rows, generator=generator)]
    if draw(st.booleans()):
        experts[:, torch.rand(rows, generator=generator) < 0.5] = 0
    return experts * draw(st.sampled_from([1e-30, 1.0, 1e30]))
