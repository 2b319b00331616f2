"""Small groups and weights for centre tests, and the errors of a centre in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.codecs.bitmap import unpack_bitmap
from resmoe_dist.compression.blocks import AlignedExperts, BlockSizes, EntryWeights
from resmoe_dist.compression.encoding import GroupCodecs, encode_group

DEFAULT_SIZES = BlockSizes()
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)


@st.composite
def small_groups(draw: st.DrawFn, coarse: bool = True) -> Tensor:
    """Up to four experts of up to three rows and two columns.

    coarse: half of the groups are rounded, so that entries tie and experts have equal values.
    """
    count, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    experts = torch.randn(count, rows, columns, generator=generator)
    return experts.round() if coarse and draw(st.booleans()) else experts


def in_stored_order(
    experts: Tensor, weights: EntryWeights | None = None, sizes: BlockSizes = DEFAULT_SIZES
) -> AlignedExperts:
    """Experts whose stored rows are already aligned."""
    count, rows, _ = experts.shape
    return AlignedExperts(experts, torch.arange(rows).repeat(count, 1), weights, sizes=sizes)


def center_and_masks(
    experts: AlignedExperts, keep: float, center: str = "joint"
) -> tuple[Tensor, Tensor]:
    """The centre [I, D], and masks [E, I, D] of the residual entries that are kept."""
    codecs = GroupCodecs(CodecSpec(name="pruned", options={"keep": keep}), torch.float32)
    encoded = encode_group(experts, codecs, center=center)
    columns = experts.experts_EID.shape[2]
    masks = [unpack_bitmap(residual.bitmap, columns) for residual in encoded.residuals]
    return encoded.center.decode(), torch.stack(masks)


def squared_error(experts: Tensor, center_ID: Tensor, masks: Tensor) -> float:
    """The error if only masked entries have a residual, in float64."""
    lost = (experts.double() - center_ID.double()).numpy()
    return float((lost[~masks.numpy()] ** 2).sum())


def error_around(experts: Tensor, center_ID: Tensor, keep: float) -> float:
    """The error if the share `keep` of the largest residuals is kept, in float64."""
    squares = np.sort(((experts.double() - center_ID.double()).numpy() ** 2).ravel())
    return float(squares[: squares.size - int(keep * squares.size)].sum())


def random_weights(rows: int, columns: int, output_columns: slice, seed: int = 0) -> EntryWeights:
    """Weights between 0.1 and about 3 for each column and row."""
    generator = torch.Generator().manual_seed(seed)
    column_D = 0.1 + 2 * torch.rand(columns, generator=generator)
    return EntryWeights(column_D, 0.1 + 3 * torch.rand(rows, generator=generator), output_columns)


def weight_matrix(weights: EntryWeights) -> Tensor:
    """The weight of every entry [I, D], computed one by one."""
    output = range(len(weights.column_D))[weights.output_columns]
    return torch.tensor(
        [
            [float(c) * (float(r) if d in output else 1.0) for d, c in enumerate(weights.column_D)]
            for r in weights.row_I
        ]
    )
