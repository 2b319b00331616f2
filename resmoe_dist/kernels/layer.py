"""The weights of one MoE layer on one rank, as every backend takes them.

Legend: L local experts, S rows of this rank's shard of an expert, G centres, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from resmoe_dist.codecs import EncodedMatrix
from resmoe_dist.design_matrix import ExpertShape


class Activation(Protocol):
    """The function between an expert's input and output projections.

    Takes the outputs [N, S] of the input projections (gate and up, or in) and returns h [N, S].
    kernel: its name among the activations that fused kernels support, or None.
    """

    @property
    def kernel(self) -> str | None: ...

    def __call__(self, *inputs: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Local experts l: centers[center_of[l]] + residuals[l], over rows [S] of this rank.

    shape: of a whole expert. residuals: one per local expert, all of one codec. centers: the shared
    centres. center_of: the centre of each local expert, -1 for none.
    """

    shape: ExpertShape
    residuals: tuple[EncodedMatrix, ...]
    centers: tuple[EncodedMatrix, ...]
    center_of: tuple[int, ...]
    activation: Activation

    def __post_init__(self) -> None:
        assert len(self.residuals) == len(self.center_of) > 0
        assert all(-1 <= center < len(self.centers) for center in self.center_of)

    @property
    def num_experts(self) -> int:
        """L."""
        return len(self.residuals)

    @property
    def rows(self) -> int:
        """S."""
        return self.residuals[0].rows

    @property
    def hidden(self) -> int:
        """H."""
        return self.shape.hidden

    @property
    def inputs(self) -> int:
        """Number of input projections: 2 for gated experts, else 1."""
        return len(self.shape.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the tokens."""
        return self.residuals[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.residuals[0].device

    @property
    def is_dense(self) -> bool:
        """Whether the experts are stored as they are multiplied: nothing to restore or share."""
        return not self.centers and all(residual.is_dense for residual in self.residuals)

    def is_stored_as(self, residual: type[EncodedMatrix], center: type[EncodedMatrix]) -> bool:
        """Whether all residuals and all centres are of these codecs."""
        return all(isinstance(matrix, residual) for matrix in self.residuals) and all(
            isinstance(matrix, center) for matrix in self.centers
        )

    @cached_property
    def shares_one_center(self) -> bool:
        """Whether all local experts have the same centre."""
        return len(self.centers) == 1 and all(center == 0 for center in self.center_of)

    def center_of_copies(self, expert_N: Tensor) -> Tensor:
        """Centre of each copy, -1 for none and for dropped copies (expert number L)."""
        return torch.tensor([*self.center_of, -1], device=expert_N.device)[expert_N]

    def subset(self, experts: int) -> LayerWeights:
        """The first few experts as a layer, sharing memory."""
        return LayerWeights(
            self.shape,
            self.residuals[:experts],
            self.centers,
            self.center_of[:experts],
            self.activation,
        )
