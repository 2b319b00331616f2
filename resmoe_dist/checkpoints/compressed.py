"""The compressed checkpoint: a Hugging Face model folder with its experts in separate files.

    config.json            the source's, plus "quantization_config": {"quant_method": "resmoe", …}
    model-*.safetensors    everything that is not an expert, under its original names, and its index
    resmoe-LLLLL-of-LLLLL-group-GGG.safetensors    centre and residuals of one group
    resmoe.json            the index (see `format`)

A group file holds `center.<tensor>` for each tensor of the centre's codec (unless the group has no
centre), `experts.K.<tensor>` for each tensor of the residuals' codec, and, in families with output
biases, `experts.K.output_bias` [H].

Legend: H hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.entries import STORED_DTYPES, FileEntry, GroupEntry, LayerEntry
from resmoe_dist.checkpoints.format import (
    INDEX_FILE,
    LISTS_ALL_FILES,
    CheckpointIndex,
    index_digest,
    read_index,
)
from resmoe_dist.checkpoints.model_folder import SHARD_INDEX, ModelFiles
from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    is_finite,
    read_json,
    sha256_of,
)
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION, stored_tensor_name
from resmoe_dist.codecs import ByteKind, EncodedMatrix, codec_named
from resmoe_dist.errors import UserError, first_line
from resmoe_dist.model_paths import files_in

CENTER = "center"
_OUTPUT_BIAS = "output_bias"


def group_tensors(
    center: EncodedMatrix | None,
    residuals: Mapping[int, EncodedMatrix],
    output_biases: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Tensors of a group file by name, from its centre and its experts' residuals and biases."""
    tensors = {}
    if center is not None:
        for name, tensor in center.tensors().items():
            tensors[f"{CENTER}.{name}"] = tensor.contiguous()
    for k, residual in residuals.items():
        for name, tensor in residual.tensors().items():
            tensors[_expert_tensor(k, name)] = tensor.contiguous()
    for k, bias_H in output_biases.items():
        tensors[_expert_tensor(k, _OUTPUT_BIAS)] = bias_H.contiguous()
    return tensors


def residual_bytes(
    residuals: Mapping[int, EncodedMatrix], output_biases: Mapping[int, Tensor]
) -> dict[ByteKind, int]:
    """Bytes of a group's residuals by kind; output biases count as values."""
    found: Counter[ByteKind] = Counter()
    for residual in residuals.values():
        found.update(residual.bytes_by_kind())
    found["values"] += sum(bias_H.nbytes for bias_H in output_biases.values())
    return dict(+found)


@dataclass(frozen=True)
class _ExpectedTensor:
    """What a group file must hold under a name. shape: None for sizes that the data decide.

    kind: None for tensors of the centre.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...]
    kind: ByteKind | None


class GroupFile:
    """An open group file: reads row ranges of the centre and of single experts.

    format_version: of the folder. Raises UserError, naming the file, if the file is missing or
    does not fit the index.
    """

    def __init__(
        self,
        folder: Path,
        layer: LayerEntry,
        group: GroupEntry,
        format_version: int = FORMAT_VERSION,
    ) -> None:
        self.layer, self.group = layer, group
        self._version = format_version
        self._file = TensorFile(folder / group.file.file)
        size = self._file.path.stat().st_size
        if size != group.file.bytes:
            raise self._damaged(f"has {size} bytes, {INDEX_FILE} says {group.file.bytes}")
        self._dtype = STORED_DTYPES[layer.dtype]
        self._check()

    def read_center(self, start: int, stop: int) -> EncodedMatrix | None:
        """Rows [start, stop) of the centre; None if the group has none."""
        if not self.group.has_center:
            return None
        assert self.layer.center_codec is not None
        return self._read_matrix(self.layer.center_codec, CENTER, "centre", start, stop)

    def read_residual(
        self, expert: int, start: int, stop: int, center: EncodedMatrix | None = None
    ) -> EncodedMatrix:
        """Rows [start, stop) of the residual of one stored expert.

        center: the same rows of the centre, for codecs whose residuals are made of it.
        """
        codec, prefix = self.layer.residual_codec, f"experts.{expert}"
        residual = self._read_matrix(codec, prefix, f"expert {expert}", start, stop)
        try:
            residual.attach(center)
        except ValueError as error:
            raise self._damaged(f"expert {expert}: {error}") from error
        return residual

    def read_output_bias(self, expert: int) -> Tensor | None:
        """Output bias [H] of one stored expert; None for families without output biases."""
        if not self.layer.output_bias:
            return None
        name = _expert_tensor(expert, _OUTPUT_BIAS)
        bias_H = self._file.read(self._stored_name(name))
        self._check_finite(name, bias_H)
        return bias_H

    def _read_matrix(
        self, codec: str, prefix: str, what: str, start: int, stop: int
    ) -> EncodedMatrix:
        def read(name: str, start: int, stop: int | None) -> Tensor:
            return self._file.read(self._stored_name(f"{prefix}.{name}"), start, stop)

        try:
            columns = self.layer.shape.columns
            matrix = codec_named(codec).read(read, columns, start, stop, self._dtype)
        except (ValueError, IndexError, RuntimeError) as error:
            raise self._damaged(f"{what}: {first_line(error)}") from error
        for name, tensor in matrix.tensors().items():
            self._check_finite(f"{prefix}.{name}", tensor)
        return matrix

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise self._damaged(f"tensor {name!r} holds NaN or infinite values")

    def _stored_name(self, name: str) -> str:
        return stored_tensor_name(name, self._version)

    def _expected(self) -> Iterator[tuple[str, _ExpectedTensor]]:
        """The tensors that the file must hold, by the name they have in it."""
        if self.group.has_center:
            assert self.layer.center_codec is not None
            yield from self._expected_matrix(self.layer.center_codec, CENTER, is_center=True)
        for k in self.group.experts:
            yield from self._expected_matrix(self.layer.residual_codec, f"experts.{k}")
            if self.layer.output_bias:
                bias = _ExpectedTensor((self.layer.hidden,), (self._dtype,), "values")
                yield self._stored_name(_expert_tensor(k, _OUTPUT_BIAS)), bias

    def _expected_matrix(
        self, codec_name: str, prefix: str, *, is_center: bool = False
    ) -> Iterator[tuple[str, _ExpectedTensor]]:
        codec, shape = codec_named(codec_name), self.layer.shape
        shapes = codec.shapes(shape.rows, shape.columns)
        for name, stored in codec.stored.items():
            kind = None if is_center else stored.kind
            expected = _ExpectedTensor(shapes[name], stored.dtypes or (self._dtype,), kind)
            yield self._stored_name(f"{prefix}.{name}"), expected

    def _check(self) -> None:
        """Compare names, shapes, dtypes and bytes in the file's header with the index."""
        surplus = set(self._file.names)
        found: Counter[str] = Counter()
        for name, expected in self._expected():
            self._check_tensor(name, expected)
            surplus.remove(name)
            found[expected.kind or CENTER] += self._file.size(name)
        if surplus:
            raise self._damaged(f"{INDEX_FILE} does not account for tensor {min(surplus)!r}")
        told: Counter[str] = Counter({CENTER: self.group.center_bytes})
        told.update(self.group.residual_bytes)
        for kind in sorted(found.keys() | told.keys()):
            if found[kind] != told[kind]:
                raise self._damaged(
                    f"holds {found[kind]} bytes of {kind}, {INDEX_FILE} says {told[kind]}"
                )

    def _check_tensor(self, name: str, expected: _ExpectedTensor) -> None:
        shape, dtype = self._file.shape(name), self._file.torch_dtype(name)
        if len(shape) != len(expected.shape) or any(
            want not in (None, have) for want, have in zip(expected.shape, shape, strict=True)
        ):
            raise self._damaged(f"tensor {name!r} has shape {list(shape)}")
        if dtype not in expected.dtypes:
            wanted = " or ".join(map(_dtype_name, expected.dtypes))
            raise self._damaged(f"tensor {name!r} is stored as {_dtype_name(dtype)}, not {wanted}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._file.path}: damaged ({what}); compress again or copy it anew")


class CompressedCheckpoint:
    """A compressed checkpoint on disk: its index, and its files on demand.

    index: of the folder, if it was read before. verify: compare each file that is opened, and once
    all files that are not groups', with their digests. Raises UserError if the folder is not a
    compressed checkpoint or links out of itself, its format version is newer than this program, or
    the index is damaged.
    """

    def __init__(
        self, folder: Path, index: CheckpointIndex | None = None, *, verify: bool = False
    ) -> None:
        self.folder = folder
        self.index = read_index(folder) if index is None else index
        self._verify = verify
        if verify:
            self._refuse(self._index_faults())
            self._refuse(self._faults_of(self.index.other_files))

    def open_group(self, layer: LayerEntry, group: GroupEntry) -> GroupFile:
        """The file of one group. Raises UserError as `GroupFile` does."""
        file = GroupFile(self.folder, layer, group, self.index.format_version)
        if self._verify:
            self._refuse(self._faults_of([group.file]))
        return file

    def files(self) -> list[FileEntry]:
        """Every file that the index lists."""
        groups = [group.file for layer in self.index.layers for group in layer.groups]
        return self.index.other_files + groups

    def faults(self) -> list[str]:
        """One line for each file that is missing, surplus or differs from the index.

        Reads every file once for its digest, checks group files against the index, and the tensors
        of the other files against theirs. Empty if all is well.
        """
        faults = [*self._index_faults(), *self._faults_of(self.files())]
        bad = {fault.split(":", 1)[0] for fault in faults}
        for layer in self.index.layers:
            for group in layer.groups:
                if group.file.file not in bad:
                    try:
                        self.open_group(layer, group)
                    except UserError as error:
                        faults.append(f"{group.file.file}: {error}")
        if not faults:
            faults += self._surplus_tensors()
        return faults

    def _refuse(self, faults: Iterator[str]) -> None:
        for fault in faults:
            raise UserError(f"{self.folder}/{fault}; compress again or copy it anew")

    def _index_faults(self) -> Iterator[str]:
        """Is the index as it was written, and does it list every file that a reader may open?"""
        if self.index.format_version < LISTS_ALL_FILES:
            return
        if self.index.digest != index_digest(read_json(self.folder / INDEX_FILE)):
            yield f"{INDEX_FILE}: differs from its digest"
        listed = {INDEX_FILE, *(entry.file for entry in self.files())}
        for name in files_in(self.folder):
            if name not in listed and not _is_document(name):
                yield f"{name}: {INDEX_FILE} does not list it"

    def _faults_of(self, entries: list[FileEntry]) -> Iterator[str]:
        for entry in entries:
            path = self.folder / entry.file
            if not path.is_file():
                yield f"{entry.file}: missing"
            elif (size := path.stat().st_size) != entry.bytes:
                yield f"{entry.file}: {size} bytes, the index says {entry.bytes}"
            elif sha256_of(path) != entry.sha256:
                yield f"{entry.file}: its sha256 differs from the index"

    def _surplus_tensors(self) -> Iterator[str]:
        """Tensors of shards that the folder's index does not list or puts elsewhere."""
        try:
            files = ModelFiles(self.folder)
        except UserError as error:
            yield f"{SHARD_INDEX}: {error}"
            return
        for name in sorted(set(files.listed.values())):
            for tensor in sorted(files.file(name).names):
                if files.listed.get(tensor) != name:
                    yield f"{name}: tensor {tensor!r} is not in {SHARD_INDEX}"


def _is_document(name: str) -> bool:
    """Whether a file is for people alone."""
    return name.endswith(".md") or name.upper().startswith(("LICENSE", "NOTICE"))


def _expert_tensor(expert: int, name: str) -> str:
    return f"experts.{expert}.{name}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
