"""Design matrices: conversion from and to projections, row order, and tensor-parallel row ranges.

The reference is the expert's MLP in float64 NumPy with the weights of `torch.nn.Linear`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.design_matrix import ExpertShape, from_rows, projection_columns, row_range, to_rows

SHAPES = [
    ExpertShape(rows, hidden, gated=gated, row_bias=bias, output_bias=bias)
    for rows, hidden in ((7, 5), (1, 3), (12, 1))
    for gated in (True, False)
    for bias in (True, False)
]


def _random_projections(shape: ExpertShape) -> dict[str, torch.Tensor]:
    def linear(inputs: int, outputs: int) -> torch.nn.Linear:
        return torch.nn.Linear(inputs, outputs, dtype=torch.float64)

    projections = {}
    layers = {name: linear(shape.hidden, shape.rows) for name in shape.inputs}
    for name, layer in (layers | {shape.output: linear(shape.rows, shape.hidden)}).items():
        projections[name] = layer.weight.detach()
        if shape.row_bias and name in shape.inputs:
            projections[f"{name}_bias"] = layer.bias.detach()
    return projections


def _mlp(shape: ExpertShape, projections: dict[str, torch.Tensor], x_TH: np.ndarray) -> np.ndarray:
    """The expert without its output bias: down(silu(gate x) · up x), or out(relu(in x))."""
    arrays = {name: tensor.numpy() for name, tensor in projections.items()}

    def project(name: str) -> np.ndarray:
        return x_TH @ arrays[name].T + arrays.get(f"{name}_bias", 0.0)

    if shape.gated:
        gate = project("gate")
        return (gate / (1 + np.exp(-gate)) * project("up")) @ arrays["down"].T
    return np.maximum(project("in"), 0) @ arrays["out"].T


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_holds_every_weight_of_a_neuron(shape):
    projections = _random_projections(shape)

    matrix = to_rows(shape, projections)

    assert matrix.shape == (shape.rows, shape.columns)
    assert shape.entries == matrix.numel() == sum(p.numel() for p in projections.values())
    for i in range(shape.rows):
        expected = [projections[name][i] for name in shape.inputs]
        expected.append(projections[shape.output][:, i])
        if shape.row_bias:
            expected += [projections[f"{name}_bias"][i : i + 1] for name in shape.inputs]
        assert torch.equal(matrix[i], torch.cat(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_from_rows_undoes_to_rows(shape):
    projections = _random_projections(shape)

    found = from_rows(shape, to_rows(shape, projections))

    assert found.keys() == projections.keys()
    for name, tensor in projections.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shape", SHAPES)
def test_to_rows_undoes_from_rows(shape):
    matrix = torch.randn(shape.rows, shape.columns)

    assert torch.equal(to_rows(shape, from_rows(shape, matrix)), matrix)


def test_from_rows_returns_views():
    matrix = torch.zeros(4, ExpertShape(4, 3).columns)

    from_rows(ExpertShape(4, 3), matrix)["down"][2, 1] = 7

    assert matrix.sum() == 7


@pytest.mark.parametrize("shape", SHAPES)
def test_permuting_rows_does_not_change_the_expert(shape):
    projections = _random_projections(shape)
    x_TH = np.random.default_rng(0).normal(size=(9, shape.hidden))

    permuted = to_rows(shape, projections)[torch.randperm(shape.rows)]

    expected = _mlp(shape, projections, x_TH)
    np.testing.assert_allclose(_mlp(shape, from_rows(shape, permuted), x_TH), expected, atol=1e-14)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.rows > 1])
def test_partial_outputs_of_all_tensor_parallel_ranks_sum_to_the_experts(shape):
    projections = _random_projections(shape)
    matrix = to_rows(shape, projections)
    x_TH = np.random.default_rng(0).normal(size=(9, shape.hidden))
    expected = _mlp(shape, projections, x_TH)

    for size in range(1, shape.rows + 1):
        ranges = [row_range(shape.rows, rank, size) for rank in range(size)]
        parts = [_mlp(shape, from_rows(shape, matrix[start:stop]), x_TH) for start, stop in ranges]
        np.testing.assert_allclose(sum(parts), expected, atol=1e-14)


@pytest.mark.parametrize(
    ("gated", "row_bias", "expected"),
    [
        (True, False, [[0, 1], [2, 3], [4, 5]]),
        (True, True, [[0, 1, 6], [2, 3, 7], [4, 5]]),
        (False, False, [[0, 1], [2, 3]]),
        (False, True, [[0, 1, 4], [2, 3]]),
    ],
)
def test_row_bias_is_a_column_of_its_projection(gated, row_bias, expected):
    shape = ExpertShape(rows=5, hidden=2, gated=gated, row_bias=row_bias)

    assert [columns.tolist() for columns in projection_columns(shape)] == expected
    assert shape.projections == len(expected)


@given(data=st.data(), rows=st.integers(1, 40_000))
@settings(deadline=None)
def test_row_ranges_tile_all_rows_and_are_not_empty(data, rows):
    size = data.draw(st.integers(1, min(rows, 300)))

    ranges = [row_range(rows, rank, size) for rank in range(size)]

    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert all(start < stop for start, stop in ranges)


@given(data=st.data(), rows=st.integers(1, 40_000))
@settings(deadline=None)
def test_row_range_sizes_differ_by_at_most_one(data, rows):
    size = data.draw(st.integers(1, min(rows, 300)))

    heights = {stop - start for start, stop in (row_range(rows, r, size) for r in range(size))}

    assert max(heights) - min(heights) <= 1
