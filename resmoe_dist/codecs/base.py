"""What every codec offers: encode, decode, slice rows, read a row range from a file, its bytes.

Legend: I rows of the whole expert, R rows held here (a TP rank's range), D columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

# read(name, start, stop) returns elements [start, stop) of a stored tensor's first dimension,
# and touches no others; stop = None reads to the end.
TensorReader = Callable[[str, int, "int | None"], Tensor]


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

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return dict(self.named_buffers())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, indices included."""
        return sum(tensor.nbytes for tensor in self.buffers())
