"""`mobe` and `bases`: residuals that are made of what the group shares, in place of a centre."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs import BasesConfig, BasesMatrix, DenseMatrix, MobeMatrix
from resmoe_dist.design_matrix import ExpertShape, from_rows, to_rows

SHAPES = [
    ExpertShape(rows=9, hidden=6),
    ExpertShape(rows=7, hidden=5, row_bias=True),
    ExpertShape(rows=8, hidden=6, gated=False),
    ExpertShape(rows=7, hidden=7, gated=False, row_bias=True),
]
RANK, BASES = 3, 2
every_shape = pytest.mark.parametrize("shape", SHAPES)


def _made(shape: ExpertShape) -> tuple[BasesMatrix, MobeMatrix, Tensor]:
    """Bases, an expert of them, and the design matrix of its projections computed by hand."""
    inputs, width = len(shape.inputs), shape.hidden + shape.row_bias
    bases = torch.randn(inputs, BASES, RANK, width)
    left, mixing = torch.randn(shape.rows, inputs, RANK), torch.rand(inputs, BASES)
    output = torch.randn(shape.rows, shape.hidden)
    weights = {shape.output: output.T}
    for j, name in enumerate(shape.inputs):
        mixed = sum(mixing[j, i] * bases[j, i] for i in range(BASES))
        block = left[:, j] @ (mixed * torch.sigmoid(mixed))
        weights[name] = block[:, : shape.hidden]
        if shape.row_bias:
            weights[f"{name}_bias"] = block[:, shape.hidden]
    center = BasesMatrix.of(bases, shape.rows, shape.columns, torch.float32)
    return (
        center,
        MobeMatrix.of(left, mixing, output, center, torch.float32),
        to_rows(shape, weights),
    )


@every_shape
def test_expert_is_made_of_the_bases(shape):
    center, residual, expected = _made(shape)

    torch.testing.assert_close(residual.decode(), expected)
    assert not center.decode().any()
    for start, stop in ((0, 4), (3, 3), (2, 7)):
        part = residual.slice_rows(start, stop).slice_rows(0, stop - start)
        torch.testing.assert_close(part.decode(), expected[start:stop])


@every_shape
def test_products_are_those_of_the_projections(shape):
    center, residual, expected = _made(shape)
    weights, hidden = from_rows(shape, expected), shape.hidden
    x, h = torch.randn(5, hidden), torch.randn(5, shape.rows)

    for i, name in enumerate(shape.inputs):
        torch.testing.assert_close(residual.multiply(x, i * hidden), x @ weights[name].T)
        assert not center.multiply(x, i * hidden).any()
    first = len(shape.inputs) * hidden
    found = residual.multiply_back(h, first, hidden)
    torch.testing.assert_close(found, h @ weights[shape.output].T)
    # Columns that are no whole projection.
    torch.testing.assert_close(residual.multiply(x[:, :3], 1), x[:, :3] @ expected[:, 1:4].T)


def test_bases_count_once_and_move_with_the_centre():
    center, residual, expected = _made(SHAPES[0])
    layer = torch.nn.ModuleList([center, residual])

    own = {"left", "mixing", "output"}
    assert residual.tensors().keys() == own
    assert residual.nbytes == 4 * (9 * 2 * RANK + 2 * BASES + 9 * 6)
    assert center.nbytes == 4 * 2 * BASES * RANK * 6
    moved = copy.deepcopy(layer).double()
    assert moved[1].decode().dtype == torch.float64
    moved[0].bases.zero_()
    # The copy's expert is made of the copy's bases, the first one still of its own.
    assert not moved[1].decode()[:, :12].any()
    torch.testing.assert_close(residual.decode(), expected)


@pytest.mark.parametrize(
    ("keep", "rank"),
    # Down is a third: 5 of 15 columns; the rest is divided among gate and up.
    [(0.5, 1), (0.75, 3), (1.0, 5), (0.2, 1)],
)
def test_rank_is_what_the_output_projection_leaves(keep, rank):
    config = BasesConfig(keep=keep, bases=4, blocks=3)

    assert config.rank_of(9, 15) == rank
    assert MobeMatrix.stored_bytes(9, 15, config, 2) == 2 * (9 * (2 * rank + 5) + 2 * 4)
    assert BasesMatrix.stored_bytes(9, 15, config, 2) == 2 * 2 * 4 * rank * 5
    # A slice has its rows of the factors and of down.
    assert MobeMatrix.sliced_bytes(9, 15, 4, config, 2) == 2 * (4 * (2 * rank + 5) + 2 * 4)
    assert BasesMatrix.sliced_bytes(9, 15, 4, config, 2) == 2 * 2 * 4 * rank * 5


def _reader(tensors: dict[str, Tensor]):
    return lambda name, start, stop: tensors[name][start:stop]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("left", lambda left: left[:, :1], "factors of shape"),
        ("mixing", lambda mixing: mixing[:0], "factors of shape"),
        ("output", lambda output: output[:, 1:], "an output projection of 5 columns"),
    ],
)
def test_expert_whose_tensors_contradict_each_other_is_refused(name, change, reason):
    tensors = _made(SHAPES[0])[1].tensors()
    tensors[name] = change(tensors[name])

    with pytest.raises(ValueError, match=reason):
        MobeMatrix.read(_reader(tensors), 18, 0, 9, torch.float32)


def test_bases_that_do_not_fit_are_refused():
    center, residual, _ = _made(SHAPES[0])
    with pytest.raises(ValueError, match="bases of shape"):
        BasesMatrix.read(_reader({"bases": center.bases[..., 1:]}), 18, 0, 9, torch.float32)
    with pytest.raises(ValueError, match="the group has no bases"):
        residual.attach(DenseMatrix.of(torch.zeros(9, 18)))
    with pytest.raises(ValueError, match="for bases of shape"):
        residual.attach(BasesMatrix.of(center.bases[:, :, 1:], 9, 18, torch.float32))
    with pytest.raises(ValueError, match="the group has no bases"):
        residual.attach(None)


def test_silu_is_the_activation():
    center, residual, _ = _made(SHAPES[2])
    mixed = torch.einsum("i,irw->rw", residual.mixing[0], center.bases[0])

    torch.testing.assert_close(residual.decode()[:, :6], residual.left[:, 0] @ F.silu(mixed))
