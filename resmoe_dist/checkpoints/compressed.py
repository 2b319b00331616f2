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

from resmoe_dist.checkpoints.format import (
    INDEX_FILE,
    STORED_DTYPES,
    FileEntry,
    GroupEntry,
    LayerEntry,
    read_index,
)
from resmoe_dist.checkpoints.tensor_files import TensorFile, sha256_of
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION, stored_tensor_name
from resmoe_dist.codecs import ByteKind, EncodedMatrix, codec_named
from resmoe_dist.errors import UserError

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

    def read_residual(self, expert: int, start: int, stop: int) -> EncodedMatrix:
        """Rows [start, stop) of the residual of one stored expert."""
        codec, prefix = self.layer.residual_codec, f"experts.{expert}"
        return self._read_matrix(codec, prefix, f"expert {expert}", start, stop)

    def read_output_bias(self, expert: int) -> Tensor | None:
        """Output bias [H] of one stored expert; None for families without output biases."""
        if not self.layer.output_bias:
            return None
        return self._file.read(self._stored_name(_expert_tensor(expert, _OUTPUT_BIAS)))

    def _read_matrix(
        self, codec: str, prefix: str, what: str, start: int, stop: int
    ) -> EncodedMatrix:
        def read(name: str, start: int, stop: int | None) -> Tensor:
            return self._file.read(self._stored_name(f"{prefix}.{name}"), start, stop)

        try:
            columns = self.layer.shape.columns
            return codec_named(codec).read(read, columns, start, stop, self._dtype)
        except (ValueError, IndexError, RuntimeError) as error:
            raise self._damaged(f"{what}: {error}") from error

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

    Raises UserError if the folder is not a compressed checkpoint, its format version is newer than
    this program, or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)

    def open_group(self, layer: LayerEntry, group: GroupEntry) -> GroupFile:
        """The file of one group. Raises UserError as `GroupFile` does."""
        return GroupFile(self.folder, layer, group, self.index.format_version)

    def files(self) -> list[FileEntry]:
        """Every file that the index lists."""
        groups = [group.file for layer in self.index.layers for group in layer.groups]
        return self.index.other_files + groups

    def faults(self) -> list[str]:
        """One line for each file that is missing or differs from the index; empty if all are whole.

        Reads every file once for its digest, and checks group files against the index.
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


def _expert_tensor(expert: int, name: str) -> str:
    return f"experts.{expert}.{name}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
