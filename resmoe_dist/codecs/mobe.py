"""`mobe`: input projections as a matrix times a mixture of bases, the output projection as it is.

MoBE (Mixture-of-Basis-Experts, Chen et al. 2025, arXiv:2508.05257): input projection j of an
expert is left[:, j] · silu(Σ_i mixing[j, i] · bases[j, i]). The bases are shared by the group and
stored in the place of its centre (codec `bases`). Only the method `mobe` makes such matrices.

`left` and `output` have one row per neuron and are sharded with the rows.

Legend: I rows, R rows held here, D columns, p input projections, m bases, r rank, F = ⌊D/(p+1)⌋
columns of a block of the design matrix without its bias, W with it, N copies, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs.base import EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.bases import BasesConfig, BasesMatrix
from resmoe_dist.codecs.low_rank_blocks import join_blocks
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec


@register_codec
class MobeMatrix(EncodedMatrix):
    """left [R, p, r], mixing [p, m] and output [R, F], beside the group's bases."""

    name = "mobe"
    config = BasesConfig
    stored = {
        "left": StoredTensor("values"),
        "mixing": StoredTensor("values", per_row=False),
        "output": StoredTensor("values"),
    }
    standalone = False

    left: Tensor
    mixing: Tensor
    output: Tensor

    # In a tuple: a module that is an attribute would become a part of this one, and count as such.
    _center: tuple[BasesMatrix, ...] = ()

    @classmethod
    def of(
        cls,
        left_Ipr: Tensor,
        mixing_pm: Tensor,
        output_IF: Tensor,
        center: BasesMatrix,
        dtype: torch.dtype,
    ) -> MobeMatrix:
        """From an expert's own tensors and its group's bases."""
        tensors = {"left": left_Ipr, "mixing": mixing_pm, "output": output_IF}
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        found = cls((len(left_Ipr), center.columns), stored, dtype)
        found.attach(center)
        return found

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> MobeMatrix:
        raise NotImplementedError("experts and bases are fitted together")

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> MobeMatrix:
        found = super().read(read, columns, start, stop, dtype)
        inputs = len(found.mixing)
        if found.left.dim() != 3 or found.left.shape[1] != inputs or not inputs:
            raise ValueError(f"factors of shape {list(found.left.shape[1:])}, {inputs} mixtures")
        if found.output.shape[1] != columns // (inputs + 1):
            raise ValueError(f"an output projection of {found.output.shape[1]} columns")
        return found

    def attach(self, center: EncodedMatrix | None) -> None:
        if not isinstance(center, BasesMatrix):
            raise ValueError("the group has no bases")
        inputs, bases, rank, _ = center.bases.shape
        if self.mixing.shape != (inputs, bases) or self.left.shape[1:] != (inputs, rank):
            raise ValueError(
                f"factors of shape {list(self.left.shape[1:])} and mixtures of shape "
                f"{list(self.mixing.shape)} for bases of shape {list(center.bases.shape)}"
            )
        self._center = (center,)

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"left": (rows, None, None), "mixing": (None, None), "output": (rows, None)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: BasesConfig, itemsize: int) -> int:
        return cls.sliced_bytes(rows, columns, rows, config, itemsize)

    @classmethod
    def sliced_bytes(
        cls, rows: int, columns: int, held: int, config: BasesConfig, itemsize: int
    ) -> int:
        inputs, output = config.blocks - 1, columns // config.blocks
        own = held * (inputs * config.rank_of(rows, columns) + output)
        return (own + inputs * config.bases) * itemsize

    def slice_rows(self, start: int, stop: int) -> MobeMatrix:
        found = super().slice_rows(start, stop)
        found._center = self._center
        return found

    def decode(self) -> Tensor:
        width = self._bases.shape[3]
        blocks = [self.left[:, j] @ self._right(j) for j in range(len(self.mixing))]
        blocks.append(F.pad(self.output, (0, width - self.output.shape[1])))
        return join_blocks(blocks, self.columns)

    def multiply(self, x_NH: Tensor, first_column: int) -> Tensor:
        hidden = self.output.shape[1]
        j, offset = divmod(first_column, hidden)
        if j >= len(self.mixing) or offset or x_NH.shape[1] != hidden:
            return super().multiply(x_NH, first_column)
        return ((x_NH @ self._right(j)[:, :hidden].T) @ self.left[:, j].T).float()

    def multiply_back(self, h_NR: Tensor, first_column: int, hidden: int) -> Tensor:
        if (first_column, hidden) != (len(self.mixing) * self.output.shape[1], len(self.output.T)):
            return super().multiply_back(h_NR, first_column, hidden)
        return h_NR.float() @ self.output.float()

    @property
    def _bases(self) -> Tensor:
        assert self._center, "read with its centre"
        return self._center[0].bases.to(self.dtype)

    def _right(self, j: int) -> Tensor:
        """The mixture [r, W] of bases that input projection j is made of."""
        return F.silu(torch.tensordot(self.mixing[j], self._bases[j], dims=1))
