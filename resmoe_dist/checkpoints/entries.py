"""The entries of resmoe.json: files, groups of experts, routers and layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from resmoe_dist.codecs import ByteKind, codec_named
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.families.storage import ExpertStorage
from resmoe_dist.model_paths import is_plain_name, is_relative_name

DtypeName = Literal["float32", "float16", "bfloat16"]
STORED_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# In an expert map: this expert of the model is not stored.
DROPPED = -1

# More than any model has, and few enough to count through.
_MOST = 1 << 20


def _relative_name(name: str) -> str:
    if not is_relative_name(name):
        raise ValueError(f"{name!r} is not a plain file name, or one in a plain folder")
    return name


FileName = Annotated[str, AfterValidator(_relative_name)]
Count = Annotated[int, Field(ge=1, le=_MOST)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 60)]
Squares = list[Annotated[FiniteFloat, Field(ge=0)]]


class Entry(BaseModel):
    """A part of resmoe.json: immutable, strictly typed, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # Fields that are written only if they are set: older programs refuse fields they do not know.
    only_if_set: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written = serialize(self).items()
        return {key: value for key, value in written if value or key not in self.only_if_set}


class FileEntry(Entry):
    """One file of the checkpoint: name, size in bytes and digest."""

    file: FileName
    bytes: Bytes
    sha256: str


def _in_no_subfolder(entry: FileEntry) -> FileEntry:
    if not is_plain_name(entry.file):
        raise ValueError(f"{entry.file!r} is not a plain file name")
    return entry


class GroupEntry(Entry):
    """One group of experts of one layer, and what storing it cost.

    experts: numbers of the stored experts, ascending. squared_errors: ‖T_k W_k − restored_k‖² per
    stored expert (paper 001, appendix A.6, before its mean). squared_norms: ‖W_k‖² per stored
    expert. weighted_*: the same two in the activation-weighted norm, None without calibration. If
    several of the model's experts share a stored one, these are sums over them. source_bytes: of
    the experts in the source. center_bytes, residual_bytes: of the stored tensors, the residuals'
    by kind; output biases count as values. objective: of the alignment (paper 001, equation 4).
    keep: share of residual entries kept; None if the codec does not select entries, or the writer
    did not record it. residual_bits, center_bits: per entry of each stored residual and of the
    centre, for codecs that spend bits.
    """

    file: Annotated[FileEntry, AfterValidator(_in_no_subfolder)]
    experts: list[int]
    squared_errors: Squares
    squared_norms: Squares
    source_bytes: Annotated[Bytes, Field(ge=1)]
    center_bytes: Bytes
    residual_bytes: dict[ByteKind, Bytes]
    objective: FiniteFloat
    keep: FiniteFloat | None = None
    residual_bits: list[Annotated[int, Field(ge=1, le=16)]] | None = None
    center_bits: Annotated[int, Field(ge=1, le=16)] | None = None
    weighted_squared_errors: Squares | None = None
    weighted_squared_norms: Squares | None = None

    @property
    def has_center(self) -> bool:
        """Whether a centre is stored. A group without one has a centre of zero."""
        return self.center_bytes > 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of all of the group's tensors."""
        return self.center_bytes + sum(self.residual_bytes.values())


class RouterEntry(Entry):
    """A refitted router, by the calibration tokens.

    agreement_before: share of the source's choices (token, expert) that this layer also made
    before any router was refitted. agreement_after: the same with all routers refitted.
    """

    agreement_before: Annotated[float, Field(ge=0, le=1)]
    agreement_after: Annotated[float, Field(ge=0, le=1)]


class LayerEntry(Entry):
    """One experts module: its name in the model, its shape, how it is stored, and its groups.

    num_experts: of the model. method: which made it. center_codec: how centres are stored, None if
    the layer has none. residual_codec: how residuals are stored. dtype: of stored values. storage:
    the source's tensor names, which `restore` writes back. expert_map: the stored expert of each of
    the model's experts, or DROPPED; None if every expert is stored under its own number.
    source_rows: rows of the model's experts, if the stored ones have fewer. router: None if it is
    the source's. sensitivity: of the predictions to errors of the experts, in nats per token and
    share of their energy lost; None if bits were not chosen by it. groups: a partition of the
    stored experts, in any order. A group's errors and norms are of its experts; of all the model's
    experts if a method merged or dropped some, which takes a single group.
    """

    only_if_set = frozenset({"router", "sensitivity"})

    module: str
    num_experts: Count
    rows: Count
    hidden: Count
    gated: bool
    row_bias: bool
    output_bias: bool
    method: str
    center_codec: str | None
    residual_codec: str
    dtype: DtypeName
    storage: ExpertStorage
    expert_map: list[Annotated[int, Field(ge=DROPPED)]] | None = None
    source_rows: Count | None = None
    router: RouterEntry | None = None
    sensitivity: Annotated[FiniteFloat, Field(gt=0)] | None = None
    groups: Annotated[list[GroupEntry], Field(min_length=1)]

    @property
    def shape(self) -> ExpertShape:
        """Shape of each stored expert."""
        return ExpertShape(self.rows, self.hidden, self.gated, self.row_bias, self.output_bias)

    @property
    def source_shape(self) -> ExpertShape:
        """Shape of each of the model's experts."""
        return replace(self.shape, rows=self.source_rows or self.rows)

    @property
    def stored_experts(self) -> int:
        """Number of stored experts."""
        if self.expert_map is None:
            return self.num_experts
        return len(set(self.expert_map) - {DROPPED})

    def stored_expert(self, expert: int) -> int:
        """The stored expert that the model's expert number `expert` is, or DROPPED."""
        return expert if self.expert_map is None else self.expert_map[expert]

    @property
    def kept_experts(self) -> list[int]:
        """Numbers of the model's experts that were not dropped, ascending."""
        return [k for k in range(self.num_experts) if self.stored_expert(k) != DROPPED]

    @property
    def kept_map(self) -> list[int] | None:
        """The stored expert of each kept expert; None if they are the same."""
        stored = [self.stored_expert(k) for k in self.kept_experts]
        return None if stored == list(range(len(stored))) else stored

    @property
    def has_dropped(self) -> bool:
        """Whether the router may no longer choose some of the model's experts."""
        return len(self.kept_experts) < self.num_experts

    def check(self) -> None:
        """Raise ValueError for an unknown codec, or groups or a map that contradict each other."""
        codec_named(self.residual_codec)
        if self.center_codec is not None:
            codec_named(self.center_codec)
        elif any(group.has_center for group in self.groups):
            raise ValueError(f"{self.module}: a group has a centre, and the layer no codec for it")
        if self.expert_map is not None:
            if len(self.expert_map) != self.num_experts:
                raise ValueError(
                    f"{self.module}: the expert map has {len(self.expert_map)} entries for "
                    f"{self.num_experts} experts"
                )
            if set(self.expert_map) - {DROPPED} != set(range(self.stored_experts)):
                raise ValueError(f"{self.module}: the expert map skips a stored expert")
        if self.source_rows is not None and self.source_rows < self.rows:
            raise ValueError(
                f"{self.module}: {self.rows} rows are stored of experts of {self.source_rows}"
            )
        for group in self.groups:
            if not group.experts or group.experts != sorted(group.experts):
                raise ValueError(f"{self.module}: a group's experts {group.experts} do not ascend")
        experts = sorted(k for group in self.groups for k in group.experts)
        if experts != list(range(self.stored_experts)):
            raise ValueError(f"{self.module}: the groups do not hold each expert once")
        for group in self.groups:
            squares = (
                *(group.squared_errors, group.squared_norms),
                *(group.weighted_squared_errors, group.weighted_squared_norms),
            )
            counts = {len(group.experts)} | ({self.num_experts} if self.expert_map else set())
            if any(given is not None and len(given) not in counts for given in squares):
                raise ValueError(f"{self.module}: errors or norms are not one for each expert")


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """The name of a stored dtype."""
    return next(name for name, stored in STORED_DTYPES.items() if stored == dtype)
