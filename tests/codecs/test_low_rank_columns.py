"""`low_rank_columns`: factors of each projection, plus whole columns of its weight matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import CodecSpec, LowRankColumnsConfig, LowRankColumnsMatrix
from resmoe_dist.design_matrix import ExpertShape, from_rows, projection_columns

SHAPES = [
    ExpertShape(rows=12, hidden=10),
    ExpertShape(rows=11, hidden=14, row_bias=True),
    ExpertShape(rows=12, hidden=10, gated=False),
    ExpertShape(rows=10, hidden=13, gated=False, row_bias=True),
]


def _config(shape: ExpertShape, share: float = 0.7, sparse: float = 0.2) -> LowRankColumnsConfig:
    return LowRankColumnsConfig(blocks=shape.projections, share=share, sparse=sparse)


def _low_rank(weight: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def test_a_column_that_the_factors_miss_is_kept_by_hand():
    # H = 2, two-layer, I = 2: `in` is [[4, 0], [0, 1]], downᵀ the same. Rank 1 keeps the 4.
    block = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    config = LowRankColumnsConfig(blocks=2, share=0.9, sparse=0.5)

    found = LowRankColumnsMatrix.encode(torch.cat([block, block], 1), config, torch.float32)

    # One of two columns of `in`, and one of two rows of downᵀ: the ones with the 1.
    assert found.kept_columns.tolist() == [[1]]
    assert found.row_offsets.tolist() == [0, 0, 1]
    torch.testing.assert_close(found.decode(), torch.cat([block, block], 1), atol=1e-5, rtol=0)


def test_weights_decide_which_columns_are_kept():
    block = torch.tensor([[9.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]])
    matrix, config = torch.cat([block, block], 1), LowRankColumnsConfig(blocks=2, sparse=0.34)
    weights = torch.ones(3, 6)
    weights[:, 2] = weights[2, 3:] = 10

    plain = LowRankColumnsMatrix.fit(matrix, config, torch.float32)
    weighted = LowRankColumnsMatrix.fit(matrix, config, torch.float32, weights)

    assert plain.kept_columns.tolist() == [[1]]
    assert plain.row_offsets.tolist() == [0, 0, 1, 1]
    assert weighted.kept_columns.tolist() == [[2]]
    assert weighted.row_offsets.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_projection_is_low_rank_plus_its_largest_columns(shape):
    matrix, config = torch.randn(shape.rows, shape.columns), _config(shape)

    found = LowRankColumnsMatrix.encode(matrix, config, torch.float32)

    decoded, rank = found.decode(), found.left.shape[2]
    *inputs, output = projection_columns(shape)
    for columns in inputs:
        weight = matrix[:, columns].double().numpy()
        rest = weight - _low_rank(weight, rank)
        kept = np.sort(np.argsort(-np.abs(rest).sum(0))[: found.kept_columns.shape[1]])
        expected = _low_rank(weight, rank)
        expected[:, kept] = weight[:, kept]
        np.testing.assert_allclose(decoded[:, columns].numpy(), expected, atol=1e-4)
    weight = matrix[:, output].double().numpy()
    rest = weight - _low_rank(weight, rank)
    kept = np.sort(np.argsort(-np.abs(rest).sum(1))[: len(found.row_values)])
    expected = _low_rank(weight, rank)
    expected[kept] = weight[kept]
    np.testing.assert_allclose(decoded[:, output].numpy(), expected, atol=1e-4)
    # A fifth of the columns, rounded down; a bias is a column too.
    assert found.kept_columns.shape[1] == int(0.2 * len(inputs[0]))
    assert len(found.row_values) == int(0.2 * shape.rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", [(0, None), (3, 9)])
def test_products_equal_those_of_the_projections(shape, part):
    encoded = LowRankColumnsMatrix.encode(
        torch.randn(shape.rows, shape.columns), _config(shape), torch.float32
    )
    encoded = encoded.slice_rows(part[0], part[1] or shape.rows)
    weights = from_rows(shape, encoded.decode())
    x, h = torch.randn(4, shape.hidden), torch.randn(4, encoded.rows)

    for i, name in enumerate(shape.inputs):
        found = encoded.multiply(x, i * shape.hidden)
        torch.testing.assert_close(found, x @ weights[name].T)
    found = encoded.multiply_back(h, len(shape.inputs) * shape.hidden, shape.hidden)
    torch.testing.assert_close(found, h @ weights[shape.output].T)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_rank_is_the_largest_that_the_columns_leave_room_for(share):
    shape = ExpertShape(rows=40, hidden=30)

    found = LowRankColumnsMatrix.encode(
        torch.randn(40, 90), _config(shape, share, 0.1), torch.float32
    )

    # 3 of 30 columns twice, 4 of 40 rows: a tenth of the 3600 entries.
    assert found.column_values.numel() + found.row_values.numel() == 360
    rank, per_rank = found.left.shape[2], 3 * (40 + 30)
    assert rank * per_rank <= (share - 0.1) * 3600 + 1e-6 < (rank + 1) * per_rank


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"share": 0.2, "sparse": 0.2}, "codec low_rank_columns: sparse 0.2 must be below share"),
        ({"share": 0}, "share 0: must be above 0"),
        ({"blocks": 1}, "blocks 1: must be 2 or more"),
    ],
)
def test_wrong_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        CodecSpec(name="low_rank_columns", options=options)


def _replaced(name: str, change: Any) -> dict[str, Tensor]:
    config = LowRankColumnsConfig(sparse=0.2)
    tensors = LowRankColumnsMatrix.encode(torch.randn(10, 30), config, torch.float32).tensors()
    return tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("kept_columns", lambda kept: kept.flip(1), "not ascending numbers below 10"),
        ("kept_columns", lambda kept: kept + 9, "not ascending numbers below 10"),
        ("kept_columns", lambda kept: kept[:1], "kept columns of shape"),
        ("kept_columns", lambda kept: kept[:, :1], "the kept columns and their values disagree"),
        ("row_values", lambda values: values[:1], "rows of shape"),
        ("row_offsets", lambda offsets: offsets * 2, "stored more than once"),
        ("right", lambda right: right[:1], "3 and 1 blocks of factors"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(name, change, reason):
    tensors = _replaced(name, change)

    def read(name: str, start: int, stop: int | None) -> Tensor:
        return tensors[name][start:stop]

    with pytest.raises(ValueError, match=reason):
        LowRankColumnsMatrix.read(read, 30, 0, 10, torch.float32)
