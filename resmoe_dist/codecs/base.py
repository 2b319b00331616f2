"""What every codec offers: encode, decode, slice rows, read a row range, count bytes.

A codec stores a matrix [rows, columns] as a few tensors. Centres and residuals are both such
matrices. A new codec is one file: a subclass of `EncodedMatrix` that declares its config and its
tensors, registered with `register_codec`. Files, sizes, dtype changes, reports and tensor
parallelism follow from the declaration.

Legend: I rows of the whole matrix, R rows held here (a tensor-parallel range), D columns, H hidden,
N routed copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from typing_extensions import Self

from resmoe_dist.codecs.moments import Moments

# read(name, start, stop) returns elements [start, stop) of a stored tensor's first dimension
# without reading the others; stop = None reads to the end.
TensorReader = Callable[[str, int, "int | None"], Tensor]

# What a stored tensor holds: reports count bytes by kind.
ByteKind = Literal["values", "indices", "scales"]
BYTE_KINDS: tuple[ByteKind, ...] = ("values", "indices", "scales")


class CodecConfig(BaseModel):
    """The options of a codec. A subclass adds a field per option."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def for_blocks(self, blocks: int) -> Self:
        """The same options for a matrix of so many projections, for codecs that need to know."""
        return self


class BudgetConfig(CodecConfig):
    """The options of a codec whose size is a share of the entries.

    Such codecs take part in `--keep` and `--target-bytes`.
    """

    # Not above 0 only: the search for a byte target starts at 0.
    keep: float = Field(default=0.25, ge=0, le=1, description="share of the entries kept")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an encoded matrix.

    kind: what it holds. per_row: whether its first dimension is the rows of the matrix, so that a
    row range is a slice; other tensors are shared by all rows. dtypes: what it may be stored as,
    and it stays so when a model moves to another dtype. None: the dtype of the layer's values,
    which follows the model.
    """

    kind: ByteKind
    per_row: bool = True
    dtypes: tuple[torch.dtype, ...] | None = None


class EncodedMatrix(nn.Module, ABC):
    """A matrix [R, D] as its codec stores it, in files and in memory.

    Its tensors are non-persistent buffers: they follow the module to a device or dtype and count as
    its memory, but stay out of state dicts (they have files of their own).

    shape: (R, D). tensors: the stored tensors by name. dtype: what `decode` returns; a model that
    moves to another dtype changes it.
    """

    name: ClassVar[str]
    config: ClassVar[type[CodecConfig]] = CodecConfig
    stored: ClassVar[dict[str, StoredTensor]] = {}
    # Whether `encode` can keep chosen entries (a mask), so that the centre and the kept entries
    # can be chosen together. Its config is then a BudgetConfig.
    selects_entries: ClassVar[bool] = False
    # Whether a stored tensor is the matrix itself, rounded to the stored dtype. `decode` then
    # restores nothing, and `encode` may be given the rounded matrix, which saves a float32 copy.
    is_dense: ClassVar[bool] = False
    # Whether its config has `bits`, so that a target of bytes chooses the bits of each matrix.
    spends_bits: ClassVar[bool] = False
    # Whether `encode` uses second moments.
    uses_moments: ClassVar[bool] = False
    # Whether `encode` makes it of a matrix alone. Otherwise one method makes it of a whole group.
    standalone: ClassVar[bool] = True

    def __init__(
        self, shape: tuple[int, int], tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.rows, self.columns = shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        # Knows dtype and device, and moves with the stored tensors.
        self._like = torch.empty(0, dtype=dtype, device=device)

    # --- What a codec defines ---

    @classmethod
    @abstractmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Self:
        """Encode a float32 matrix [I, D], with values stored as `dtype`.

        config: an instance of `cls.config`. mask_ID: the entries to keep, for codecs that select
        entries; None lets the codec choose. moments: of what multiplies the matrix, for codecs
        that use them; None weighs all entries alike.
        """

    @classmethod
    def error_at(cls, config: Any, bits: int) -> float:
        """The share of Gaussian entries' energy that is lost, for codecs that spend bits."""
        raise NotImplementedError(f"{cls.name} does not spend bits")

    @classmethod
    @abstractmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        """Shape of each stored tensor of a matrix [rows, columns]; None if the data decide."""

    @classmethod
    @abstractmethod
    def stored_bytes(cls, rows: int, columns: int, config: Any, itemsize: int) -> int:
        """Upper bound of the bytes that a matrix [rows, columns] takes.

        itemsize: bytes of a stored value.
        """

    @abstractmethod
    def decode(self) -> Tensor:
        """The dense matrix [R, D] in `self.dtype`."""

    # --- What follows from the declaration; a codec overrides what it can do better ---

    @classmethod
    def sliced_bytes(cls, rows: int, columns: int, held: int, config: Any, itemsize: int) -> int:
        """Bytes of `held` consecutive rows of a matrix [rows, columns], as `slice_rows` keeps them.

        An upper bound for matrices whose rows all take the same bytes; otherwise an estimate that
        spreads the values evenly over the rows. A codec with tensors that all rows share overrides
        this: here such a matrix counts whole.
        """
        whole = cls.stored_bytes(rows, columns, config, itemsize)
        if not all(tensor.per_row for tensor in cls.stored.values()):
            return whole
        return -(-whole * held // rows)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> Self:
        """Read rows [start, stop) and nothing else.

        dtype: of the layer's stored values. Raises ValueError if the tensors contradict each other
        (a damaged file).
        """
        tensors = {
            name: read(name, start, stop) if tensor.per_row else read(name, 0, None)
            for name, tensor in cls.stored.items()
        }
        return cls((stop - start, columns), tensors, dtype)

    def attach(self, center: EncodedMatrix | None) -> None:
        """Give a residual its group's centre, of the same rows, before anything is decoded.

        Raises ValueError if it does not fit (a damaged file).
        """

    def slice_rows(self, start: int, stop: int) -> Self:
        """Rows [start, stop) as views of the same tensors."""
        tensors = {
            name: tensor[start:stop] if self.stored[name].per_row else tensor
            for name, tensor in self.tensors().items()
        }
        return type(self)((stop - start, self.columns), tensors, self.dtype)

    @classmethod
    def join_rows(cls, parts: list[Self]) -> Self:
        """The matrix whose consecutive row ranges are `parts`; the inverse of `slice_rows`.

        Only codecs that select entries are encoded in parts.
        """
        raise NotImplementedError(f"{cls.name} encodes whole matrices")

    def decode_columns(self, first: int, count: int) -> Tensor:
        """Columns [first, first + count) of `decode`."""
        return self.decode()[:, first : first + count]

    def add_to(self, dense_RC: Tensor, first_column: int = 0) -> None:
        """dense += decode(), in place, for columns [first_column, first_column + C)."""
        dense_RC += self.decode_columns(first_column, dense_RC.shape[1])

    def multiply(self, x_NH: Tensor, first_column: int) -> Tensor:
        """x · Mᵀ over columns [first_column, first_column + H): [N, R] in float32."""
        block_RH = self.decode_columns(first_column, x_NH.shape[1])
        return x_NH.float() @ block_RH.float().T

    def multiply_back(self, h_NR: Tensor, first_column: int, hidden: int) -> Tensor:
        """h · M over columns [first_column, first_column + H): [N, H] in float32."""
        block_RH = self.decode_columns(first_column, hidden)
        return h_NR.float() @ block_RH.float()

    # --- The same for all codecs ---

    @property
    def dtype(self) -> torch.dtype:
        """Of `decode`."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Of the stored tensors."""
        return self._like.device

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return dict(self.named_buffers())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, indices and scales included."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def bytes_by_kind(self) -> dict[ByteKind, int]:
        """Bytes of the stored tensors by what they hold; kinds without bytes are left out."""
        found: dict[ByteKind, int] = {}
        for name, tensor in self.tensors().items():
            kind = self.stored[name].kind
            found[kind] = found.get(kind, 0) + tensor.nbytes
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module would cast every floating-point buffer; scales and the like keep their dtype.
        for name, tensor in self._buffers.items():
            assert tensor is not None
            follows = self.stored[name].dtypes is None
            self._buffers[name] = fn(tensor) if follows else tensor.to(fn(tensor[:0]).device)
        self._like = fn(self._like)
        return self
