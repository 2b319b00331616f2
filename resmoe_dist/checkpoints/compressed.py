"""The compressed checkpoint: a Hugging Face model folder whose experts lie in files of their own.

    config.json            the source's, plus "quantization_config": {"quant_method": "resmoe", …}
    model-*.safetensors    everything that is no expert, under its original names, with its index
    resmoe-LLLLL-of-LLLLL-group-GGG.safetensors    centre (or none) and residuals of one group
    resmoe.json            the index, described by the models below

Version 2 lets groups be any partition of a layer's experts, and a group do without a centre.

Legend: I rows, D columns, H hidden.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import TensorFile, sha256_of, tensor_bytes
from resmoe_dist.codecs import CODECS, EncodedResidual, codec_named
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.families.storage import ExpertStorage

FORMAT_VERSION = 2
INDEX_FILE = "resmoe.json"
QUANT_METHOD = "resmoe"

STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")


def _plain_file_name(name: str) -> str:
    if not _PLAIN_NAME.match(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain_file_name)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Entry):
    """One file of the checkpoint: name, size in bytes and digest."""

    file: FileName
    bytes: int
    sha256: str


class GroupEntry(_Entry):
    """One group of experts of one layer, and what storing it cost.

    experts: their numbers in the layer, ascending. squared_errors: ‖T_k W_k − restored_k‖² per
    expert (paper 001, appendix A.6, before its mean). squared_norms: ‖W_k‖² per expert; weighted_*:
    the same two in the activation-weighted norm, None without calibration. *_bytes: of the stored
    tensors, by what they hold. objective: of the alignment (paper 001, equation 4). keep: share of
    residual entries that the masks kept; None where there are no masks, or the writer did not say.
    """

    file: FileEntry
    experts: list[int]
    squared_errors: list[float]
    squared_norms: list[float]
    source_bytes: int
    center_bytes: int
    value_bytes: int
    index_bytes: int
    objective: float
    keep: float | None = None
    weighted_squared_errors: list[float] | None = None
    weighted_squared_norms: list[float] | None = None

    @property
    def has_center(self) -> bool:
        """Whether a centre is stored; without one it counts as zero."""
        return self.center_bytes > 0

    @property
    def stored_bytes(self) -> int:
        """Everything the group's tensors take: centre, values and indices."""
        return self.center_bytes + self.value_bytes + self.index_bytes


class LayerEntry(_Entry):
    """One experts module: its name in the model, its shape, its codec and its groups.

    groups: each expert is in one of them, in whatever order. storage: the source's tensor names, in
    which `restore` writes the dense experts back.
    """

    module: str
    num_experts: int
    rows: int
    hidden: int
    gated: bool
    row_bias: bool
    output_bias: bool
    codec: str
    dtype: Literal["float32", "float16", "bfloat16"]
    storage: ExpertStorage
    groups: list[GroupEntry]

    @property
    def shape(self) -> ExpertShape:
        """Shape of each expert."""
        return ExpertShape(self.rows, self.hidden, self.gated, self.row_bias, self.output_bias)


class CompressionSettings(_Entry):
    """How the checkpoint was made: the options of `resmoe-dist compress`.

    groups: G, the `--ep` it was compressed for. groups_per_rank: of each of its G ranks. layers:
    positions of the compressed layers among the model's MoE layers; the others are stored dense.
    dtype None: as the source. target_bytes: share of the dense expert bytes that everything stored
    was to take; `keep` is then what that came to. allocate: over what one budget of kept entries
    is shared out. calibration: SHA-256 of the calibration token ids.
    """

    groups: int
    groups_per_rank: int = 1
    keep: float
    target_bytes: float | None = None
    allocate: Literal["block", "expert", "group", "model"] = "group"
    codec: Literal["pruned", "low_rank"]
    align: Literal["loo", "pot", "none"]
    solver: Literal["scipy", "lapx"] = "scipy"
    center: Literal["auto", "joint", "barycenter", "mean", "none"]
    calibration: str | None = None
    layers: list[int]
    dtype: Literal["float32", "float16", "bfloat16"] | None = None


class CheckpointIndex(_Entry):
    """The content of resmoe.json."""

    format_version: int
    producer: str
    settings: CompressionSettings
    layers: list[LayerEntry]
    other_files: list[FileEntry]


def group_file_name(layer: int, num_layers: int, group: int) -> str:
    """File name of one group; layers are counted from 1 as model shards are, groups from 0."""
    return f"resmoe-{layer + 1:05d}-of-{num_layers:05d}-group-{group:03d}.safetensors"


def group_tensors(
    center_ID: Tensor | None,
    residuals: dict[int, EncodedResidual],
    output_biases: dict[int, Tensor],
) -> dict[str, Tensor]:
    """Tensors of a group file by name, from its centre and its experts' residuals and biases."""
    tensors = {} if center_ID is None else {"center": center_ID.contiguous()}
    for k, residual in residuals.items():
        for name, tensor in residual.tensors().items():
            tensors[f"experts.{k}.{name}"] = tensor.contiguous()
    for k, bias_H in output_biases.items():
        tensors[f"experts.{k}.output_bias"] = bias_H.contiguous()
    return tensors


class GroupFile:
    """An open group file: reads row ranges of the centre and of single experts.

    Raises UserError, naming the file, when it is missing or damaged.
    """

    def __init__(self, folder: Path, layer: LayerEntry, group: GroupEntry) -> None:
        self.layer, self.group = layer, group
        self._file = TensorFile(folder / group.file.file)
        size = self._file.path.stat().st_size
        if size != group.file.bytes:
            raise self._damaged(f"has {size} bytes, {INDEX_FILE} says {group.file.bytes}")
        self._codec = codec_named(layer.codec)
        self._check_shapes()
        self._check_dtype()

    def read_center(self, start: int, stop: int) -> Tensor | None:
        """Rows [start, stop) of the centre; None for a group without one."""
        return self._read("center", start, stop) if self.group.has_center else None

    def read_residual(self, expert: int, start: int, stop: int) -> EncodedResidual:
        """Rows [start, stop) of one expert's residual."""

        def read(name: str, start: int, stop: int | None) -> Tensor:
            return self._read(f"experts.{expert}.{name}", start, stop)

        try:
            return self._codec.read(read, self.layer.shape.columns, start, stop)
        except (ValueError, IndexError, RuntimeError) as error:
            raise self._damaged(f"expert {expert}: {error}") from error

    def read_output_bias(self, expert: int) -> Tensor | None:
        """Output bias [H] of one expert; None for families without biases."""
        if not self.layer.output_bias:
            return None
        return self._read(f"experts.{expert}.output_bias", 0, None)

    def _read(self, name: str, start: int, stop: int | None) -> Tensor:
        return self._file.read(name, start, stop)

    def _check_shapes(self) -> None:
        shape = self.layer.shape
        expected: dict[str, tuple[int | None, ...]] = {}
        if self.group.has_center:
            expected["center"] = (shape.rows, shape.columns)
        for k in self.group.experts:
            for name, dims in self._codec.expected_tensors(shape.rows, shape.columns).items():
                expected[f"experts.{k}.{name}"] = dims
            if shape.output_bias:
                expected[f"experts.{k}.output_bias"] = (shape.hidden,)
        for name, dims in expected.items():
            found = self._file.shape(name)
            if len(found) != len(dims) or any(
                want is not None and want != have for want, have in zip(dims, found, strict=True)
            ):
                raise self._damaged(f"tensor {name!r} has shape {list(found)}")

    def _check_dtype(self) -> None:
        # What a codec stores as values only it knows; how many bytes they take the index says.
        dtype = _SAFETENSORS_DTYPES[self.layer.dtype]
        sizes = tensor_bytes(self._file.path)
        found = sum(size for name, size in sizes.items() if self._file.dtype(name) == dtype)
        expected = self.group.center_bytes + self.group.value_bytes
        if found != expected:
            raise self._damaged(f"holds {found} bytes of {dtype}, {INDEX_FILE} says {expected}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._file.path}: damaged ({what}); compress again or copy it anew")


class CompressedCheckpoint:
    """A compressed checkpoint on disk: its index, and its files on demand.

    Raises UserError when the folder is none, its format version is newer than this program, or the
    index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)

    def open_group(self, layer: LayerEntry, group: GroupEntry) -> GroupFile:
        """The file of one group."""
        return GroupFile(self.folder, layer, group)

    def files(self) -> list[FileEntry]:
        """Every file the index accounts for."""
        groups = [group.file for layer in self.index.layers for group in layer.groups]
        return self.index.other_files + groups

    def faults(self) -> list[str]:
        """One line for each file that is missing or differs from the index; empty when all is well.

        Reads every file once for its digest, and checks the shapes in those that hold groups.
        """
        faults = []
        for entry in self.files():
            path = self.folder / entry.file
            if not path.is_file():
                faults.append(f"{entry.file}: missing")
            elif (size := path.stat().st_size) != entry.bytes:
                faults.append(f"{entry.file}: {size} bytes, the index says {entry.bytes}")
            elif sha256_of(path) != entry.sha256:
                faults.append(f"{entry.file}: its sha256 differs from the index")
        bad = {fault.split(":", 1)[0] for fault in faults}
        for layer in self.index.layers:
            for group in layer.groups:
                if group.file.file not in bad:
                    try:
                        self.open_group(layer, group)
                    except UserError as error:
                        faults.append(f"{group.file.file}: {error}")
        return faults


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a compressed checkpoint."""
    return (folder / INDEX_FILE).is_file()


def read_index(folder: Path) -> CheckpointIndex:
    """The index of a compressed checkpoint.

    Raises UserError for a folder without one, a newer format version, or a damaged index.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: no {INDEX_FILE} here; give a folder made by resmoe-dist compress"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if not isinstance(version, int):
            raise ValueError(f"format_version is {version!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); compress again or copy it anew") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version} is newer than this program reads "
            f"({FORMAT_VERSION}); upgrade resmoe-dist"
        )
    try:
        index = CheckpointIndex.model_validate(raw)
        for layer in index.layers:
            _check_layer(layer)
        if version == 1 and index.settings.center != "joint":
            # Version 1 gave each expert a budget, unless it chose centre and masks together.
            settings = index.settings.model_copy(update={"allocate": "expert"})
            index = index.model_copy(update={"settings": settings})
    except (ValidationError, ValueError) as error:
        reason = str(error).splitlines()
        raise UserError(
            f"{path}: damaged ({' '.join(reason[:3])}); compress again or copy it anew"
        ) from error
    return index


def _check_layer(layer: LayerEntry) -> None:
    if layer.codec not in CODECS:
        raise ValueError(f"codec {layer.codec!r} is not one of {', '.join(CODECS)}")
    for group in layer.groups:
        if not group.experts or group.experts != sorted(group.experts):
            raise ValueError(f"{layer.module}: a group's experts {group.experts} do not ascend")
    experts = sorted(k for group in layer.groups for k in group.experts)
    if experts != list(range(layer.num_experts)):
        raise ValueError(f"{layer.module}: the groups do not hold each expert once")
