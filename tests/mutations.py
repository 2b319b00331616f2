"""Random damage to model folders: seeded, so that a number names one mutation.

A mutation changes one file: bits, length, kind of file, name, or a value anywhere in its JSON, also
in the header of a safetensors file. `mutate` never touches links or files outside the folder.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a JSON value may turn into.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**63, 10**30, -(2**40)),
    *(0.5, 1e300, float("nan"), float("inf"), "", "x", "a/b", "../c", "/etc/passwd", "\ud800"),
    *([], {}, [[]], [0], {"a": 1}, ["float32"], "float16", "bfloat16", "gelu", "silu", "auto"),
)
_SPECIAL_FILES = ("directory", "fifo", "link", "nothing", "empty")


def mutate(folder: Path, seed: int) -> str:
    """Change one file of a folder, and say how."""
    draw = random.Random(seed)
    path = folder / draw.choice(sorted(p.name for p in folder.iterdir()))
    # Config and index have most of the meaning and few of the bytes.
    kinds: list[Callable[[Path, random.Random], str]] = [_flip_bits, _resize, _replace_file]
    kinds += [_surplus, _swap]
    if path.suffix == ".json":
        kinds += [_edit_json] * 8
    if path.suffix == ".safetensors":
        kinds += [_flip_bits, _edit_header, _edit_header, _edit_header, _spoil_values]
    how = draw.choice(kinds)(path, draw)
    return f"{path.name}: {how}"


def _flip_bits(path: Path, draw: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    places = [draw.randrange(len(raw)) for _ in range(draw.choice((1, 1, 1, 8)))] if raw else []
    for place in places:
        raw[place] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
    return f"bits of bytes {places}"


def _resize(path: Path, draw: random.Random) -> str:
    raw = path.read_bytes()
    size = draw.choice((0, 1, 7, 8, 9, len(raw) // 2, len(raw) - 1, len(raw) + 5))
    path.write_bytes(raw[:size] + draw.randbytes(max(0, size - len(raw))))
    return f"{len(raw)} to {size} bytes"


def _replace_file(path: Path, draw: random.Random) -> str:
    kind = draw.choice(_SPECIAL_FILES)
    raw = path.read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        outside = path.parent.parent / "outside"
        outside.write_bytes(raw)
        path.symlink_to(outside)
    elif kind == "empty":
        path.write_text(draw.choice(("", "{}", "[]", "null", "[" * 100_000)))
    return f"replaced by {kind}"


def _surplus(path: Path, draw: random.Random) -> str:
    name = draw.choice(
        ("model.safetensors", "adapter_config.json", "tokenizer_config.json", "chat_template.jinja")
    )
    path.with_name(name).write_bytes(path.read_bytes())
    return f"copied to {name}"


def _swap(path: Path, draw: random.Random) -> str:
    same = sorted(p for p in path.parent.glob(f"*{path.suffix}") if p.is_file())
    other = draw.choice(same)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


def _edit_json(path: Path, draw: random.Random) -> str:
    value = json.loads(path.read_text())
    how = _edit_value(value, draw)
    path.write_text(json.dumps(value))
    return how


def _edit_header(path: Path, draw: random.Random) -> str:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    how = _edit_value(header, draw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return f"header: {how}"


def _spoil_values(path: Path, draw: random.Random) -> str:
    """NaN, infinity, or a huge number among the values of a float32 file."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    place = 8 + length + 4 * draw.randrange(max(1, (len(raw) - 8 - length) // 4))
    value = draw.choice((float("nan"), float("inf"), -1e38, 1e30))
    raw[place : place + 4] = struct.pack("<f", value)
    path.write_bytes(raw)
    return f"{value} at byte {place}"


def _edit_value(value: Any, draw: random.Random) -> str:
    """Change, remove, add or move one entry anywhere in a JSON value, in place."""
    places = list(_places(value))
    if not places:
        return "nothing to edit"
    holder, key = draw.choice(places)
    action = draw.choice(("set", "set", "set", "scale", "remove", "rename", "exchange", "deepen"))
    if action == "remove":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif action == "exchange":
        other, name = draw.choice(places)
        holder[key], other[name] = json.loads(json.dumps([other[name], holder[key]]))
    elif action == "scale" and type(holder[key]) in (int, float):
        holder[key] = holder[key] * draw.choice((-1, 2, 10, 10**6)) + draw.choice((0, 1))
    elif action == "deepen":
        for _ in range(draw.choice((1, 200))):
            holder[key] = [holder[key]]
    else:
        holder[key] = draw.choice(_VALUES)
    return f"{action} {key!r}"


def _places(value: Any) -> Any:
    """Every container and key in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries) if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(entry, dict | list):
            yield from _places(entry)
