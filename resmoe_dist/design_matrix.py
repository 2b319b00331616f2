"""An expert MLP as a set of rows, one per intermediate neuron.

Paper 001 (ResMoE), equation 3: an expert with I intermediate neurons is the sum of I one-neuron
MLPs. So the expert is a matrix with one row per neuron, and the order of the rows does not matter:

    gated      W = [ gate | up | downᵀ | gate_bias | up_bias ]      D = 3H (+ 2 with biases)
    two-layer  W = [ in   | outᵀ      | in_bias ]                   D = 2H (+ 1)

The output bias belongs to the whole expert, not to a row. It is stored next to the matrix.

Legend: I rows (intermediate neurons), H hidden size, D columns of the design matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertShape:
    """Shape of one expert's design matrix.

    rows: I. hidden: H. gated: the projections are gate, up and down; otherwise in and out.
    row_bias: the input projections have biases, stored as extra columns. output_bias: the expert
    has an output bias [H], stored next to the matrix.
    """

    rows: int
    hidden: int
    gated: bool = True
    row_bias: bool = False
    output_bias: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the projections that read the hidden state."""
        return ("gate", "up") if self.gated else ("in",)

    @property
    def output(self) -> str:
        """Name of the projection that writes the hidden state."""
        return "down" if self.gated else "out"

    @property
    def projections(self) -> int:
        """How many weight matrices an expert has."""
        return len(self.inputs) + 1

    @property
    def columns(self) -> int:
        """D."""
        inputs = len(self.inputs)
        return (inputs + 1) * self.hidden + (inputs if self.row_bias else 0)

    @property
    def entries(self) -> int:
        """I·D."""
        return self.rows * self.columns


def row_range(rows: int, rank: int, size: int) -> tuple[int, int]:
    """The rows [⌊rank·rows/size⌋, ⌊(rank+1)·rows/size⌋) of tensor-parallel rank `rank`.

    The ranges of all `size` ranks tile [0, rows). If size ≤ rows, every rank has at least one row.
    """
    return rank * rows // size, (rank + 1) * rows // size


def row_ranges(rows: int, step: int) -> Iterator[slice]:
    """Ranges of at most `step` rows that tile [0, rows)."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def to_rows(shape: ExpertShape, projections: dict[str, Tensor]) -> Tensor:
    """Build the design matrix [I, D] of one expert.

    projections: a weight [I, H] for each name in `shape.inputs` (with `shape.row_bias` also
    `<name>_bias` [I]) and a weight [H, I] for `shape.output`, oriented as in `torch.nn.Linear`.
    """
    blocks = [projections[name] for name in shape.inputs]
    blocks.append(projections[shape.output].T)
    if shape.row_bias:
        blocks += [projections[f"{name}_bias"].unsqueeze(1) for name in shape.inputs]
    return torch.cat(blocks, dim=1)


def projection_columns(shape: ExpertShape) -> list[Tensor]:
    """The columns of each projection with its row bias, if any: inputs in order, then the output.

    Together they are all D columns. They are int64 indices, because biases are at the end of a row.
    """
    H = shape.hidden
    names = (*shape.inputs, shape.output)
    columns = [torch.arange(i * H, (i + 1) * H) for i in range(len(names))]
    if shape.row_bias:
        for i in range(len(shape.inputs)):
            columns[i] = torch.cat([columns[i], torch.tensor([len(names) * H + i])])
    return columns


def from_rows(shape: ExpertShape, matrix_ID: Tensor) -> dict[str, Tensor]:
    """Split a design matrix, or a range of its rows, into projections: the inverse of `to_rows`.

    The tensors are views of `matrix_ID`.
    """
    H = shape.hidden
    views = {name: matrix_ID[:, i * H : (i + 1) * H] for i, name in enumerate(shape.inputs)}
    weights_end = (len(shape.inputs) + 1) * H
    views[shape.output] = matrix_ID[:, weights_end - H : weights_end].T
    if shape.row_bias:
        for i, name in enumerate(shape.inputs):
            views[f"{name}_bias"] = matrix_ID[:, weights_end + i]
    return views
