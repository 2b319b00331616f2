"""`low_rank_blocks`: each projection with its bias has its own factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import LowRankBlocksConfig, LowRankBlocksMatrix
from resmoe_dist.design_matrix import ExpertShape, projection_columns

SHAPES = [
    ExpertShape(rows=9, hidden=6),
    ExpertShape(rows=5, hidden=8, row_bias=True),
    ExpertShape(rows=9, hidden=6, gated=False),
    ExpertShape(rows=7, hidden=7, gated=False, row_bias=True),
]


def _encode(matrix_ID: Tensor, blocks: int, **options: float) -> LowRankBlocksMatrix:
    config = LowRankBlocksConfig(blocks=blocks, **options)
    return LowRankBlocksMatrix.encode(matrix_ID, config, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_tail_of_each_projections_singular_values(shape):
    matrix_ID = torch.randn(shape.rows, shape.columns)

    encoded = _encode(matrix_ID, shape.projections, rank=2)

    for columns in projection_columns(shape):
        values = np.linalg.svd(matrix_ID[:, columns].double().numpy(), compute_uv=False)
        lost = (matrix_ID - encoded.decode())[:, columns].double().square().sum()
        assert float(lost) == pytest.approx(float(np.sum(values[2:] ** 2)), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_everything_does_not_round(shape):
    matrix_ID = torch.randn(shape.rows, shape.columns)

    assert torch.equal(_encode(matrix_ID, shape.projections, keep=1.0).decode(), matrix_ID)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_is_the_largest_whose_factors_hold_the_share(shape, keep):
    encoded = _encode(torch.randn(shape.rows, shape.columns), shape.projections, keep=keep)

    rank = encoded.left.shape[2]
    per_rank = encoded.left.numel() // rank + encoded.right.numel() // rank
    fitting = [r for r in range(1, 30) if r * per_rank <= keep * shape.entries]
    # One singular vector is stored even if none fits.
    assert rank == max(fitting, default=1)


def test_bytes_are_those_of_all_factors():
    encoded = _encode(torch.randn(11, 3 * 8 + 2), 3, rank=2)

    assert encoded.nbytes == 3 * 2 * (11 + 9) * 4


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ({"left": (slice(None), slice(None), slice(1))}, "factors of rank 1 and 2"),
        ({"left": (slice(None), slice(2))}, "2 and 3 blocks"),
        ({"right": (slice(None), slice(None), slice(4))}, "3 blocks of 4 columns, the matrix has"),
        ({"left": (slice(None), 0)}, "factors of 2 and 3 dimensions"),
    ],
)
def test_factors_that_do_not_fit_are_refused(cut, reason):
    tensors = _encode(torch.randn(9, 15), 3, rank=2).tensors()
    tensors |= {name: tensors[name][part] for name, part in cut.items()}

    def read(name: str, start: int, stop: int | None) -> Tensor:
        return tensors[name][start:stop]

    with pytest.raises(ValueError, match=reason):
        LowRankBlocksMatrix.read(read, 15, 0, 9, torch.float32)
