"""The files of a model folder that are not weights: tokenizer, templates, defaults, notes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from resmoe_dist.checkpoints.format import INDEX_FILE
from resmoe_dist.checkpoints.tensor_files import copy_file
from resmoe_dist.errors import UserError

# Weights, optimiser states and archives of any framework.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|hdf5|keras|msgpack|onnx|onnx_data|npz|npy|pkl"
    r"|pickle|joblib|pb|tflite|mlmodel|engine|ot|nemo|distcp|pdparams|mar|pte|tar|gz|zip|data"
    r"|index\.json)$",
    re.IGNORECASE,
)


def companions(folder: Path) -> list[Path]:
    """The paths of a folder's companion files, relative to it, in order.

    Left out: weights in any format and their indexes, hidden files, links to folders, and folders
    that hold weights, which are other models or other formats of this one.

    Raises UserError for a link that leads out of the folder, unless it is a snapshot of Hugging
    Face's cache, whose files are links.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    found = sorted(_files(folder, is_root=True))
    for path in found:
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise UserError(f"{path}: leads out of the folder; put the file itself there")
    return [path.relative_to(folder) for path in found]


def copy_companions(source: Path, target: Path) -> None:
    """Copy companion files, except those that `target` has already."""
    for path in companions(source):
        copied = target / path
        if not copied.exists():
            copied.parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / path, copied)


def _files(folder: Path, *, is_root: bool = False) -> Iterator[Path]:
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    if not is_root and any(_is_weight(entry.name) for entry in entries):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file() and not _is_weight(entry.name) and entry.name != INDEX_FILE:
            yield Path(entry.path)


def _is_weight(name: str) -> bool:
    return _WEIGHTS.search(name) is not None
