"""Products and sums that codecs compute without a dense matrix, against float64.

Legend: R rows, D columns, H hidden, N copies.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import (
    CODECS,
    EncodedMatrix,
    LowRankBlocksMatrix,
    LowRankColumnsMatrix,
    LowRankMatrix,
    codec_named,
)
from resmoe_dist.codecs.low_rank_blocks import join_blocks

ROWS, HIDDEN, COPIES = 11, 9, 7
# Two inputs, an output, and two columns of biases.
COLUMNS = 3 * HIDDEN + 2
every_codec = pytest.mark.parametrize(
    "codec", [name for name in CODECS if codec_named(name).standalone]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


class Encoded(NamedTuple):
    """A matrix, its exact entries, and the magnitudes of what they are sums of."""

    matrix: EncodedMatrix
    exact: Tensor
    magnitude: Tensor


def encoded(name: str, dtype: torch.dtype) -> Encoded:
    matrix_RD = torch.randn(ROWS, COLUMNS)
    # Rows of which `pruned` keeps nothing, at both ends and in between.
    matrix_RD[[0, 3, 4, ROWS - 1]] *= 1e-3
    codec = codec_named(name)
    matrix = codec.encode(matrix_RD, codec.config(), dtype)
    doubled = copy.deepcopy(matrix).double()
    exact = doubled.decode()
    magnitude = exact.abs()
    if isinstance(doubled, LowRankMatrix):
        magnitude = doubled.left.abs() @ doubled.right.abs()
    if isinstance(doubled, LowRankBlocksMatrix | LowRankColumnsMatrix):
        pairs = list(zip(doubled.left.unbind(1), doubled.right, strict=True))
        product = join_blocks([left_Rr @ right_rW for left_Rr, right_rW in pairs], COLUMNS)
        bounds = [left_Rr.abs() @ right_rW.abs() for left_Rr, right_rW in pairs]
        # What is not the product is in whole columns.
        magnitude = join_blocks(bounds, COLUMNS) + (exact - product).abs()
    return Encoded(matrix, exact, magnitude)


def rounding(dtype: torch.dtype) -> float:
    """Error relative to the magnitudes: three roundings, of the entries or a first product, of the
    sum, and of the result. float32 sums are rounded too: sixteen."""
    times = 16 if dtype == torch.float32 else 3
    return times * torch.finfo(dtype).eps / 2


def assert_close(found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= allowed).all())


@every_codec
@every_dtype
@pytest.mark.parametrize("column", [0, HIDDEN, 5])
def test_multiply_is_a_product_with_some_columns(codec, dtype, column):
    matrix, exact, magnitude = encoded(codec, dtype)
    x_NH = torch.randn(COPIES, HIDDEN).to(dtype)
    part = slice(column, column + HIDDEN)

    found = matrix.multiply(x_NH, column)

    assert found.dtype == torch.float32
    allowed = rounding(dtype) * (x_NH.double().abs() @ magnitude[:, part].T)
    assert_close(found, x_NH.double() @ exact[:, part].T, allowed)


@every_codec
@every_dtype
@pytest.mark.parametrize("column", [0, 2 * HIDDEN, 5])
def test_multiply_back_is_a_product_with_some_columns(codec, dtype, column):
    matrix, exact, magnitude = encoded(codec, dtype)
    h_NR = torch.randn(COPIES, ROWS).to(dtype)
    part = slice(column, column + HIDDEN)

    found = matrix.multiply_back(h_NR, column, HIDDEN)

    assert found.dtype == torch.float32
    allowed = rounding(dtype) * (h_NR.double().abs() @ magnitude[:, part])
    assert_close(found, h_NR.double() @ exact[:, part], allowed)


@every_codec
@every_dtype
def test_add_to_adds_some_columns_of_some_rows(codec, dtype):
    matrix, exact, magnitude = encoded(codec, dtype)
    for first, stop in ((0, ROWS), (0, 4), (2, 7), (ROWS - 1, ROWS), (5, 5)):
        for column, end in ((0, COLUMNS), (0, 1), (HIDDEN, 2 * HIDDEN), (13, COLUMNS), (4, 4)):
            # A part of a larger matrix.
            memory = torch.randn(stop - first, end - column + 3).to(dtype)
            dense = memory[:, : end - column]
            before, beside = dense.double(), memory[:, end - column :].clone()

            matrix.slice_rows(first, stop).add_to(dense, column)

            part = slice(first, stop), slice(column, end)
            allowed = rounding(dtype) * (magnitude[part] + before.abs())
            assert_close(dense, before + exact[part], allowed)
            assert torch.equal(memory[:, end - column :], beside)


@every_codec
def test_slices_of_slices_are_rows_of_the_whole(codec):
    matrix, _, _ = encoded(codec, torch.float32)

    found = matrix.slice_rows(2, 9).slice_rows(1, 6)

    assert found.rows == 5
    assert torch.equal(found.decode(), matrix.decode()[3:8])


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_matrix_follows_a_module_to_another_dtype(codec, dtype):
    matrix, _, _ = encoded(codec, torch.float32)
    kept = {
        name: tensor.dtype
        for name, tensor in matrix.tensors().items()
        if matrix.stored[name].dtypes is not None
    }

    moved = torch.nn.Sequential(matrix).to(dtype)[0]

    assert moved.dtype == moved.decode().dtype == dtype
    for name, tensor in moved.tensors().items():
        assert tensor.dtype == kept.get(name, dtype)


@every_codec
def test_bytes_by_kind_are_those_of_the_tensors(codec):
    matrix, _, _ = encoded(codec, torch.bfloat16)

    assert sum(matrix.bytes_by_kind().values()) == matrix.nbytes
    assert matrix.nbytes == sum(tensor.nbytes for tensor in matrix.tensors().values())
    config = codec_named(codec).config()
    assert matrix.nbytes <= codec_named(codec).stored_bytes(ROWS, COLUMNS, config, 2)
