"""The index of a compressed checkpoint, resmoe.json: how it was made, and reading it.

Version 3 stores centres by a codec, counts bytes by kind, and may store fewer experts than the
model has. Versions 1 and 2 are upgraded when they are read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from resmoe_dist.checkpoints.entries import DtypeName, Entry, FileEntry, LayerEntry
from resmoe_dist.checkpoints.tensor_files import read_json, write_json
from resmoe_dist.checkpoints.upgrade import FORMAT_VERSION, upgrade
from resmoe_dist.codecs import DENSE, CodecSpec
from resmoe_dist.errors import UserError
from resmoe_dist.model_paths import check_model_folder

INDEX_FILE = "resmoe.json"

# From this version on, the index has a digest, and lists every file that a reader may open.
LISTS_ALL_FILES = 3


class MethodSpec(Entry):
    """A compression method and its options: `{"name": "resmoe", "options": {"align": "loo"}}`.

    Options are checked when a method runs (`resmoe_dist.methods`). Reading a checkpoint does not
    need its method.
    """

    name: str
    options: dict[str, Any] = {}


class CompressionSettings(Entry):
    """How the checkpoint was made: the options of `resmoe-dist compress`.

    groups: G, the EP size it was compressed for. groups_per_rank: groups of each of the G ranks.
    method: of the layers listed in `layers`, positions among the model's MoE layers; the others are
    stored dense. center_codec, residual_codec: of these layers. target_bytes: share of the dense
    expert bytes that everything stored was to take; the residual codec's `keep` is then the share
    that fits. calibration: SHA-256 of the calibration token ids. recalibrate_router: whether the
    routers were refitted. dtype: of stored values; None keeps the source's.
    """

    only_if_set = frozenset({"recalibrate_router"})

    groups: int
    groups_per_rank: int = 1
    method: MethodSpec
    center_codec: CodecSpec = DENSE
    residual_codec: CodecSpec
    target_bytes: FiniteFloat | None = None
    calibration: str | None = None
    recalibrate_router: bool = False
    layers: list[int]
    dtype: DtypeName | None = None

    @property
    def chooses_bits(self) -> bool:
        """Whether `target_bytes` is met by the bits of each centre and residual."""
        return self.target_bytes is not None and self.residual_codec.codec.spends_bits


class CheckpointIndex(Entry):
    """The content of resmoe.json. format_version: of the folder, also if older than this program's.

    The entries are in the current version's form, whichever version was read. digest: SHA-256 of
    everything else in the file (`index_digest`); None before version 3. other_files: all files that
    a reader may open, except the groups' and the index itself.
    """

    format_version: int
    producer: str
    settings: CompressionSettings
    layers: Annotated[list[LayerEntry], Field(min_length=1)]
    other_files: list[FileEntry]
    digest: str | None = None

    def check(self) -> None:
        """Raise ValueError for entries that contradict each other."""
        for layer in self.layers:
            layer.check()
        names = [group.file.file for layer in self.layers for group in layer.groups]
        names += [entry.file for entry in self.other_files]
        modules = [layer.module for layer in self.layers]
        for what, found in (("file", names), ("layer", modules)):
            if len(set(found)) < len(found):
                raise ValueError(f"{what} {max(found, key=found.count)!r} is listed twice")
        if not set(self.settings.layers) <= set(range(len(self.layers))):
            raise ValueError(f"the settings name layers {self.settings.layers}")


def group_file_name(layer: int, num_layers: int, group: int) -> str:
    """File name of a group. Layers are counted from 1 as model shards are, groups from 0."""
    return f"resmoe-{layer + 1:05d}-of-{num_layers:05d}-group-{group:03d}.safetensors"


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a compressed checkpoint."""
    return (folder / INDEX_FILE).is_file()


def read_index(folder: Path) -> CheckpointIndex:
    """Read the index of a compressed checkpoint, of this or an older format version.

    Raises UserError if the folder has no index or links out of it, or the index is damaged or of a
    newer version.
    """
    check_model_folder(folder)
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: no {INDEX_FILE} here; give a folder made by resmoe-dist compress"
        )
    raw = read_json(path)
    try:
        version = raw["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version is {version!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version} is newer than this program reads "
            f"({FORMAT_VERSION}); upgrade resmoe-dist"
        )
    try:
        index = CheckpointIndex.model_validate(upgrade(raw))
        index.check()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error
    return index


def write_index(folder: Path, index: CheckpointIndex) -> None:
    """Write the index of a compressed checkpoint, with its digest."""
    raw = index.model_dump()
    write_json(folder / INDEX_FILE, raw | {"digest": index_digest(raw)})


def index_digest(raw: Any) -> str:
    """SHA-256 of the content of resmoe.json without its `digest`: keys sorted, no spaces."""
    content = {key: value for key, value in raw.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).splitlines()[:3])
    return UserError(f"{path}: damaged ({reason}); compress again or copy it anew")
