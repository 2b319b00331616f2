"""What every codec offers: encode, decode, slice rows, read a row range from a file, the products
of tokens with an expert, its bytes.

Legend: I rows of the whole expert, R rows held here (a TP rank's range), D columns, H hidden,
T tokens, N copies (a token to an expert), J jobs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

# read(name, start, stop) returns elements [start, stop) of a stored tensor's first dimension,
# and touches no others; stop = None reads to the end.
TensorReader = Callable[[str, int, "int | None"], Tensor]


@dataclass(frozen=True)
class Weights:
    """Rows of an expert: a centre [R, D] plus a residual. Either may be None, not both."""

    center: Tensor | None
    residual: EncodedResidual | None

    @property
    def rows(self) -> int:
        """R."""
        return len(self.center) if self.residual is None else self.residual.rows


class EncodedResidual(nn.Module, ABC):
    """The residual of one expert over a range of rows, as it lies in the file and in memory.

    Its tensors are non-persistent buffers: they follow the module to a device or dtype, count as
    its memory, and never enter a state dict (they have files of their own).
    """

    name: ClassVar[str]
    # Whether each entry is kept or dropped on its own, so that a centre can be chosen jointly with
    # the mask; `encode` then takes a mask.
    chooses_entries: ClassVar[bool] = False
    # Whether the residual is taken against a centre at all.
    uses_center: ClassVar[bool] = True

    def __init__(self, columns: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.columns = columns
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    @abstractmethod
    def encode(
        cls, residual_ID: Tensor, *, keep: float, dtype: torch.dtype, mask_ID: Tensor | None = None
    ) -> EncodedResidual:
        """Encode a residual [I, D], keeping the share `keep` of it, values stored as `dtype`."""

    @classmethod
    @abstractmethod
    def read(cls, read: TensorReader, columns: int, start: int, stop: int) -> EncodedResidual:
        """Read rows [start, stop) and nothing else.

        Raises ValueError where the tensors contradict each other (a damaged file).
        """

    @classmethod
    @abstractmethod
    def expected_tensors(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        """Names and shapes in the file of an expert [rows, columns]; None where data decides."""

    @classmethod
    @abstractmethod
    def stored_bytes(cls, rows: int, columns: int, keep: float, itemsize: int) -> int:
        """The most that the tensors of an expert [rows, columns] take at `keep`, in bytes.

        itemsize: bytes of a stored value.
        """

    @property
    @abstractmethod
    def rows(self) -> int:
        """R."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The residual as a dense matrix [R, D]."""

    @abstractmethod
    def slice_rows(self, start: int, stop: int) -> EncodedResidual:
        """Rows [start, stop) of this residual, without copying where the layout allows."""

    @classmethod
    def join_rows(cls, parts: list[EncodedResidual]) -> EncodedResidual:
        """The residual whose consecutive row ranges are `parts`: `slice_rows` undone.

        Only codecs that choose single entries can be encoded in parts.
        """
        raise NotImplementedError(f"{cls.name} encodes whole matrices")

    def add_to(self, dense_RD: Tensor) -> None:
        """dense += decode(), in place: with the centre in `dense` this restores the expert."""
        dense_RD += self.decode()

    def restore(
        self, center_RD: Tensor | None, out: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        """Centre plus residual, dense: as many rows and columns as `out` has, from those on."""
        rows = slice(first_row, first_row + out.shape[0])
        columns = slice(first_column, first_column + out.shape[1])
        dense_RD = self.slice_rows(rows.start, rows.stop).decode()
        if center_RD is not None:
            dense_RD = dense_RD + center_RD[rows]
        out.copy_(dense_RD[:, columns])

    def multiply(self, x_TH: Tensor, first_column: int) -> Tensor:
        """x · Rᵀ over the columns [first_column, first_column + H): [T, R]."""
        return x_TH @ self.decode()[:, first_column : first_column + x_TH.shape[1]].T

    def multiply_back(self, h_TR: Tensor, first_column: int, hidden: int) -> Tensor:
        """h · R over the columns [first_column, first_column + H): [T, H]."""
        return h_TR @ self.decode()[:, first_column : first_column + hidden]

    @classmethod
    def project_in(
        cls, x_TH: Tensor, token_N: Tensor, counts_J: list[int], jobs: list[Weights], inputs: int
    ) -> Tensor:
        """Products of copies with the input columns of their weights: [N, inputs·R], float32.

        token_N: the row of x that each copy is of; the first counts_J[0] copies belong to jobs[0],
        and so on. Weights are of this codec, of equally many rows.
        """
        rows, hidden = jobs[0].rows, x_TH.shape[1]
        out_NC = x_TH.new_empty(len(token_N), inputs * rows, dtype=torch.float32)
        begin = 0
        for weights, count in zip(jobs, counts_J, strict=True):
            copies = slice(begin, begin + count)
            begin += count
            x_nH = x_TH[token_N[copies]]
            for i in range(inputs):
                y_nR = out_NC[copies, i * rows : (i + 1) * rows]
                y_nR.zero_()
                if weights.center is not None:
                    y_nR += x_nH @ weights.center[:, i * hidden : (i + 1) * hidden].T
                if weights.residual is not None:
                    y_nR += weights.residual.multiply(x_nH, i * hidden)
        return out_NC

    @classmethod
    def project_out(
        cls,
        h_NR: Tensor,
        token_N: Tensor,
        counts_J: list[int],
        jobs: list[Weights],
        inputs: int,
        num_tokens: int,
        hidden: int,
    ) -> Tensor:
        """Products of activations with the output columns, added up per token: [T, H], float32.

        h_NR: a row per copy; jobs and copies as in `project_in`.
        """
        out_TH = h_NR.new_zeros(num_tokens, hidden, dtype=torch.float32)
        first, begin = inputs * hidden, 0
        for weights, count in zip(jobs, counts_J, strict=True):
            copies = slice(begin, begin + count)
            begin += count
            h_nR, token_n = h_NR[copies], token_N[copies]
            if weights.center is not None:
                y_nH = h_nR @ weights.center[:, first : first + hidden]
                out_TH.index_add_(0, token_n, y_nH.float())
            if weights.residual is not None:
                y_nH = weights.residual.multiply_back(h_nR, first, hidden)
                out_TH.index_add_(0, token_n, y_nH.float())
        return out_TH

    @classmethod
    def fuses_mlp(cls, device: torch.device, dtype: torch.dtype, activation: str) -> bool:
        """Whether `mlp` is there for such tensors and this activation."""
        return False

    @classmethod
    def mlp(
        cls,
        x_TH: Tensor,
        token_N: Tensor,
        weight_N: Tensor,
        counts_J: list[int],
        jobs: list[Weights],
        centers: list[Tensor],
        center_J: list[int],
        inputs: int,
        activation: str,
    ) -> Tensor:
        """Both products and the activation between them: see `ops.reference.mlp`."""
        raise NotImplementedError(f"{cls.name} has no fused MLP")

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return dict(self.named_buffers())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, indices included."""
        return sum(tensor.nbytes for tensor in self.buffers())
