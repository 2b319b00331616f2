"""The files of a model folder that are not weights: tokenizer, templates, defaults, notes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from resmoe_dist.checkpoints.format import INDEX_FILE
from resmoe_dist.checkpoints.tensor_files import copy_file
from resmoe_dist.model_paths import check_model_folder, is_relative_name

# Weights, optimiser states and archives of any framework.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|hdf5|keras|msgpack|onnx|onnx_data|npz|npy|pkl"
    r"|pickle|joblib|pb|tflite|mlmodel|engine|ot|nemo|distcp|pdparams|mar|pte|tar|gz|zip|data"
    r"|index\.json)$",
    re.IGNORECASE,
)


def companions(folder: Path) -> list[str]:
    """Names of a folder's companion files, with slashes, sorted.

    Left out: weights in any format and their indexes, hidden files, links to folders, and folders
    that hold weights, which are other models or other formats of this one.

    Raises UserError if the folder holds a link out of it.
    """
    check_model_folder(folder)
    names = (path.relative_to(folder).as_posix() for path in _files(folder, is_root=True))
    return sorted(filter(is_relative_name, names))


def copy_companions(source: Path, target: Path) -> None:
    """Copy companion files, except those that `target` has already."""
    for name in companions(source):
        copied = target / name
        if not copied.exists():
            copied.parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / name, copied)


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
