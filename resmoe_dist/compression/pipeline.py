"""Source checkpoint to compressed checkpoint: one (layer, group) at a time, one file each.

The run writes into `OUTPUT.partial` and renames it to OUTPUT when all is done, so OUTPUT is whole
or absent. Each file appears there at once, under its final name; a resumed run keeps those.

Legend: N experts of the group, I rows, D columns.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from resmoe_dist import __version__
from resmoe_dist.checkpoints.compressed import (
    FORMAT_VERSION,
    INDEX_FILE,
    QUANT_METHOD,
    STORED_DTYPES,
    CheckpointIndex,
    CompressionSettings,
    FileEntry,
    GroupEntry,
    LayerEntry,
    group_file_name,
    group_tensors,
    read_index,
)
from resmoe_dist.checkpoints.model_folder import (
    SHARD_INDEX,
    set_dtype,
    shard_name,
    write_shard_index,
)
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import (
    TensorFile,
    copy_file,
    read_json,
    sha256_of,
    write_json,
    write_tensors,
)
from resmoe_dist.codecs import DenseResidual, EncodedResidual, codec_named
from resmoe_dist.compression.assignment import Alignment, align
from resmoe_dist.compression.center import encode_group
from resmoe_dist.compression.scheduling import SingleWorker, Workers, together
from resmoe_dist.errors import UserError

_SETTINGS_FILE = "resmoe-settings.json"
_FAILURE_MARKER = "resmoe-failed"
# What a model folder holds besides weights and config: tokenizer, templates, generation defaults.
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_RECORD = "resmoe_record"


def parse_layers(text: str, count: int) -> list[int]:
    """Positions among `count` MoE layers named by `all`, `last:N`, `A-B` (inclusive) or `A,B,…`.

    Raises UserError for anything else, or a position that does not exist.
    """
    if text == "all":
        return list(range(count))
    chosen: Sequence[int]
    if match := re.fullmatch(r"last:(\d+)", text):
        chosen = range(count - int(match[1]), count)
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        chosen = range(int(match[1]), int(match[2]) + 1)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        chosen = sorted({int(part) for part in text.split(",")})
    else:
        raise UserError(f"--layers {text}: not understood; write all, last:24, 8-31 or 0,2")
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UserError(f"--layers {text}: this model has {count} MoE layers, 0 to {count - 1}")
    return list(chosen)


@dataclass(frozen=True)
class _GroupTask:
    layer: int
    group: int


@dataclass(frozen=True)
class _CopyTask:
    """Tensors of one source file that are no expert's, to become shard `shard` of `shards`."""

    names: tuple[str, ...]
    shard: int
    shards: int

    @property
    def file(self) -> str:
        """Name of the shard's file."""
        return shard_name(self.shard, self.shards)


# What each task made.
_Entries = dict[_GroupTask | _CopyTask, GroupEntry | FileEntry]


class Compression:
    """One run of `resmoe-dist compress`.

    Raises UserError for whatever the user can mend: see `SourceCheckpoint`, and experts that do not
    divide into groups, or an output folder that exists.
    """

    def __init__(
        self,
        source: SourceCheckpoint,
        output: Path,
        settings: CompressionSettings,
        workers: Workers | None = None,
    ) -> None:
        self.source, self.output, self.settings = source, output, settings
        self.workers = workers or SingleWorker()
        self.staging = output.parent / f"{output.name}.partial"
        if settings.groups < 1:
            raise UserError(f"--ep {settings.groups}: must be 1 or more")
        if not 0 < settings.keep <= 1:
            raise UserError(f"--keep {settings.keep}: must lie in (0, 1]")
        for site in source.sites:
            if site.num_experts % settings.groups:
                raise UserError(
                    f"--ep {settings.groups}: {site.module} has {site.num_experts} experts, which "
                    f"do not divide into {settings.groups} groups; choose a divisor"
                )

    def run(self, *, resume: bool = False) -> CheckpointIndex:
        """Compress everything and return the index, on every rank.

        A mistake in the input, or a full disk, leaves nothing behind unless `resume` is set; an
        interrupted run leaves `OUTPUT.partial`, from which `resume` continues.
        """
        first = self.workers.rank == 0
        if together(self.workers, lambda: first and self._make_staging(resume))[0]:
            return read_index(self.output)
        try:
            entries = {}
            for part in together(self.workers, self._do_my_tasks):
                entries |= part
            together(self.workers, lambda: first and self._finish(entries))
        except UserError:
            if first and not resume:
                shutil.rmtree(self.staging, ignore_errors=True)
            raise
        return read_index(self.output)

    def _do_my_tasks(self) -> _Entries:
        """Every so-many-th task: what each made. A rank that fails stops the others early."""
        entries: _Entries = {}
        tasks = self._tasks()[self.workers.rank :: self.workers.size]
        for task in tqdm(tasks, desc="compressing", unit="task", disable=self._quiet):
            if (self.staging / _FAILURE_MARKER).exists():
                break
            try:
                entries[task] = self._do(task)
            except UserError:
                with suppress(OSError):  # the disk may be full
                    (self.staging / _FAILURE_MARKER).touch()
                raise
        return entries

    @property
    def _quiet(self) -> bool | None:
        # None lets tqdm decide: no bar where standard error is no terminal.
        return True if self.workers.rank else None

    def _make_staging(self, resume: bool) -> bool:
        """Make or find the staging folder; True if OUTPUT is complete already."""
        if self.output.exists():
            if not resume:
                raise UserError(f"{self.output}: exists already; remove it or choose another one")
            if read_index(self.output).settings != self.settings:
                raise UserError(
                    f"{self.output}: was made with other options; choose another folder"
                )
            return True
        wanted = self.settings.model_dump() | {"source": str(self.source.folder.resolve())}
        if self.staging.exists():
            if not resume:
                raise UserError(
                    f"{self.staging}: an unfinished run is here; continue it with --resume or "
                    "remove it"
                )
            if self._unfinished_settings() != wanted:
                raise UserError(
                    f"{self.staging}: the unfinished run had other options; remove it to start anew"
                )
            (self.staging / _FAILURE_MARKER).unlink(missing_ok=True)
            # What a run that was killed was writing just then: ours, and safetensors' own.
            for stray in self.staging.glob(".*"):
                stray.unlink()
            return False
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.staging}: cannot be made ({error.strerror})") from error
        try:
            write_json(self.staging / _SETTINGS_FILE, wanted)
        except UserError:
            self.staging.rmdir()
            raise
        return False

    def _unfinished_settings(self) -> object:
        """What the run in the staging folder was started with; None if that cannot be told."""
        try:
            return json.loads((self.staging / _SETTINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _tasks(self) -> list[_GroupTask | _CopyTask]:
        tasks: list[_GroupTask | _CopyTask] = [
            _GroupTask(layer, group)
            for layer in range(len(self.source.sites))
            for group in range(self.settings.groups)
        ]
        by_file: dict[str, list[str]] = {}
        for name in self.source.other_names:
            by_file.setdefault(self.source.files.locations[name], []).append(name)
        shards = [tuple(sorted(names)) for _, names in sorted(by_file.items())]
        tasks += [_CopyTask(names, i, len(shards)) for i, names in enumerate(shards)]
        return tasks

    def _do(self, task: _GroupTask | _CopyTask) -> GroupEntry | FileEntry:
        if isinstance(task, _CopyTask):
            return self._copy(task)
        return self._compress_group(task)

    def _copy(self, task: _CopyTask) -> FileEntry:
        path = self.staging / task.file
        if not _is_whole(path):
            tensors = {name: self.source.read_other(name) for name in task.names}
            write_tensors(path, tensors, {})
        return _file_entry(path)

    def _compress_group(self, task: _GroupTask) -> GroupEntry:
        path = self.staging / group_file_name(task.layer, len(self.source.sites), task.group)
        if _is_whole(path):
            return _recorded_entry(path)
        site = self.source.sites[task.layer]
        size = site.num_experts // self.settings.groups
        experts = list(range(task.group * size, (task.group + 1) * size))
        dtype = self._stored_dtype(task.layer)

        matrices, output_biases, source_bytes = [], {}, 0
        for k in experts:
            matrix_ID, bias_H = self.source.read_expert(task.layer, k)
            source_bytes += matrix_ID.nbytes
            matrices.append(matrix_ID.float())
            if bias_H is not None:
                source_bytes += bias_H.nbytes
                output_biases[k] = bias_H.to(dtype)
        experts_NID = torch.stack(matrices)
        del matrices

        codec = self._codec(task.layer)
        if codec.uses_center:
            alignment = align(experts_NID, self.settings.align)
            aligned_NID = alignment.apply(experts_NID)
        else:
            alignment, aligned_NID = Alignment(torch.empty(0), 0.0), experts_NID
        del experts_NID
        encoded = encode_group(
            aligned_NID,
            codec,
            center=self.settings.center,
            keep=self.settings.keep,
            dtype=dtype,
        )
        if not all(map(math.isfinite, encoded.squared_errors)):
            raise UserError(
                f"{site.module}: experts {experts} hold values too large for {dtype}; choose "
                "--dtype bfloat16 or float32"
            )
        residuals = dict(zip(experts, encoded.residuals, strict=True))
        tensors = group_tensors(encoded.center_ID, residuals, output_biases)
        value_bytes, index_bytes = _bytes_by_kind(residuals, output_biases)
        record = {
            "experts": experts,
            "squared_errors": [_rounded(error) for error in encoded.squared_errors],
            "squared_norms": [_rounded(float(m.double().square().sum())) for m in aligned_NID],
            "source_bytes": source_bytes,
            "center_bytes": 0 if encoded.center_ID is None else encoded.center_ID.nbytes,
            "value_bytes": value_bytes,
            "index_bytes": index_bytes,
            "objective": _rounded(alignment.objective),
        }
        write_tensors(path, tensors, {_RECORD: json.dumps(record)})
        return _recorded_entry(path)

    def _codec(self, layer: int) -> type[EncodedResidual]:
        chosen = layer in self.settings.layers
        return codec_named(self.settings.codec) if chosen else DenseResidual

    def _stored_dtype(self, layer: int) -> torch.dtype:
        if self.settings.dtype and layer in self.settings.layers:
            return STORED_DTYPES[self.settings.dtype]
        return self.source.dtype(layer)

    def _finish(self, entries: _Entries) -> None:
        """Index, config and companions; then the folder gets its name."""
        copies = [task for task in entries if isinstance(task, _CopyTask)]
        copies.sort(key=lambda task: task.shard)
        write_shard_index(self.staging, {name: task.file for task in copies for name in task.names})
        self._write_config()
        ours = ("config.json", SHARD_INDEX, _SETTINGS_FILE)
        for path in sorted(self.source.folder.iterdir()):
            if path.is_file() and path.suffix in _COMPANION_SUFFIXES and path.name not in ours:
                copy_file(path, self.staging / path.name)
        layers = [
            LayerEntry(
                module=site.module,
                num_experts=site.num_experts,
                rows=site.shape.rows,
                hidden=site.shape.hidden,
                gated=site.shape.gated,
                row_bias=site.shape.row_bias,
                output_bias=site.shape.output_bias,
                codec=self._codec(i).name,
                dtype=str(self._stored_dtype(i)).removeprefix("torch."),
                storage=self.source.storages[i],
                groups=[entries[_GroupTask(i, g)] for g in range(self.settings.groups)],
            )
            for i, site in enumerate(self.source.sites)
        ]
        others = [entries[task] for task in copies]
        named = (SHARD_INDEX, "config.json")
        others += [_file_entry(self.staging / name) for name in named]
        index = CheckpointIndex(
            format_version=FORMAT_VERSION,
            producer=f"resmoe-dist {__version__}",
            settings=self.settings,
            layers=layers,
            other_files=others,
        )
        write_json(self.staging / INDEX_FILE, index.model_dump())
        (self.staging / _SETTINGS_FILE).unlink()
        try:
            self.staging.rename(self.output)
        except OSError as error:
            raise UserError(f"{self.output}: cannot be made ({error.strerror})") from error

    def _write_config(self) -> None:
        config = read_json(self.source.folder / "config.json")
        if self.settings.dtype:
            set_dtype(config, self.settings.dtype)
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "groups": self.settings.groups,
            "codec": self.settings.codec,
            "keep": self.settings.keep,
        }
        write_json(self.staging / "config.json", config)


def _bytes_by_kind(
    residuals: dict[int, EncodedResidual], output_biases: dict[int, Tensor]
) -> tuple[int, int]:
    """Bytes of stored values, and of the indices that say where they belong."""
    tensors = [tensor for residual in residuals.values() for tensor in residual.buffers()]
    tensors += output_biases.values()
    values = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    return values, sum(tensor.nbytes for tensor in tensors) - values


def _rounded(sum_of_squares: float) -> float:
    """To nine digits: the last of sixteen depend on how many threads shared the sum."""
    return float(f"{sum_of_squares:.9g}")


def _is_whole(path: Path) -> bool:
    """Whether a file was finished by an earlier run."""
    try:
        TensorFile(path)
    except UserError:
        return False
    return True


def _recorded_entry(path: Path) -> GroupEntry:
    """The entry of a finished group file, from the record in its own header."""
    record = json.loads(TensorFile(path).metadata[_RECORD])
    return GroupEntry(file=_file_entry(path), **record)


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
