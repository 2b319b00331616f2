"""Building damaged copies of model folders, and checking how a user's mistake is reported."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from resmoe_dist.errors import UserError

FORMAT = {"format": "pt"}
INDEX = "model.safetensors.index.json"
# The files that `sharded_copy` writes.
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@contextmanager
def mistake(match: str) -> Iterator[None]:
    """Check that the block raises a UserError whose message matches and is one line."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a folder, for a test to damage."""
    return Path(shutil.copytree(folder, target))


def sharded_copy(folder: Path, target: Path) -> Path:
    """A copy with the weights in two shards and an index."""
    copy_of(folder, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(SHARDS):
        names = sorted(tensors)[i::2]
        save_file({n: tensors[n] for n in names}, target / name, metadata=FORMAT)
        weight_map |= dict.fromkeys(names, name)
    write_index(target, weight_map)
    return target


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """Write the index of a sharded model."""
    edit_text(folder / INDEX, json.dumps({"weight_map": weight_map}))


def edit_text(path: Path, text: str) -> None:
    """Replace the content of a text file."""
    path.write_text(text, encoding="utf-8")


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace the value in a JSON file, after `change` modified it in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    edit_text(path, json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Replace the tensors in a safetensors file, after `change` modified their dict in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=FORMAT)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, parsed without the project's code, and its data's offset."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def bytes_by_tensor(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file."""
    header, _ = header_of(path)
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name[:2] != "__"}
    return {name: end - begin for name, (begin, end) in spans.items()}


def flip_byte(path: Path, offset: int) -> None:
    """Invert the lowest bit of one byte."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def flip_byte_of(path: Path, tensor: str, offset: int = 0) -> None:
    """Invert the lowest bit of one byte of a tensor."""
    header, data = header_of(path)
    flip_byte(path, data + header[tensor]["data_offsets"][0] + offset)


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first `size` bytes."""
    path.write_bytes(path.read_bytes()[:size])


def names_in(folder: Path) -> set[str]:
    """Names of the files in a folder."""
    return {path.name for path in folder.iterdir()}
