"""The files of a compressed checkpoint other than its experts: copied tensors, config, index."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resmoe_dist.checkpoints.companions import copy_companions
from resmoe_dist.checkpoints.entries import FileEntry, LayerEntry
from resmoe_dist.checkpoints.format import (
    INDEX_FILE,
    CheckpointIndex,
    CompressionSettings,
    write_index,
)
from resmoe_dist.checkpoints.model_folder import (
    drop_quantization,
    set_dtype,
    shard_name,
    write_shard_index,
)
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.checkpoints.tensor_files import read_json_object, sha256_of, write_json
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION
from resmoe_dist.compression.stages import stage
from resmoe_dist.model_paths import files_in, is_relative_name
from resmoe_dist.registration import QUANT_METHOD
from resmoe_dist.version import __version__

PRODUCER = f"resmoe-dist {__version__}"


@dataclass(frozen=True)
class Shard:
    """Shard `number` of `count`: the tensors of one source file that belong to no expert."""

    names: tuple[str, ...]
    number: int
    count: int

    @property
    def file(self) -> str:
        """File name of the shard."""
        return shard_name(self.number, self.count)


def shards_of(source: SourceCheckpoint, apart: Collection[str] = ()) -> list[Shard]:
    """Return the shards to copy: one for each file of the source that has such tensors.

    apart: tensors that make up another shard, the last one.
    """
    by_file: dict[str, list[str]] = {}
    for name in source.other_names:
        if name not in apart:
            by_file.setdefault(source.files.locations[name], []).append(name)
    contents = [tuple(sorted(names)) for _, names in sorted(by_file.items())]
    if apart:
        contents.append(tuple(sorted(apart)))
    return [Shard(names, i, len(contents)) for i, names in enumerate(contents)]


@stage("digest")
def file_entry(folder: Path, name: str) -> FileEntry:
    """Return the index entry of a file of a folder: name, size and digest."""
    path = folder / name
    return FileEntry(file=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def write_model_files(
    folder: Path,
    source: SourceCheckpoint,
    settings: CompressionSettings,
    layers: Sequence[LayerEntry],
    shards: Mapping[Shard, FileEntry],
) -> None:
    """Write shard index, config and companion files, and last the index of the checkpoint.

    Companion files are copied from the source: tokenizer, chat templates, generation defaults, and
    Python files that its config names. Nothing runs these.
    """
    write_shard_index(folder, {name: shard.file for shard in shards for name in shard.names})
    _write_config(folder, source, settings)
    copy_companions(source.folder, folder)
    groups = {group.file.file for layer in layers for group in layer.groups}
    # An interrupted run may have written the index.
    listed = groups | {entry.file for entry in shards.values()} | {INDEX_FILE}
    others = [name for name in files_in(folder) if name not in listed and is_relative_name(name)]
    written = [file_entry(folder, name) for name in others]
    index = CheckpointIndex(
        format_version=FORMAT_VERSION,
        producer=PRODUCER,
        settings=settings,
        layers=list(layers),
        other_files=[*shards.values(), *written],
    )
    write_index(folder, index)


def _write_config(folder: Path, source: SourceCheckpoint, settings: CompressionSettings) -> None:
    config = read_json_object(source.folder / "config.json")
    drop_quantization(config)
    if settings.dtype:
        set_dtype(config, settings.dtype)
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "groups": settings.groups,
        "method": settings.method.name,
        "center_codec": settings.center_codec.model_dump(),
        "residual_codec": settings.residual_codec.model_dump(),
    }
    write_json(folder / "config.json", config)
