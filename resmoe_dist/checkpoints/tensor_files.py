"""Safetensors files: read by ranges, written atomically, with errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resmoe_dist.errors import UserError, first_line

# Errors of a full disk, or of a user's full quota.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_HASH_CHUNK = 1 << 22
_LENGTH_BYTES = 8
_GLIMPSES, _GLIMPSE_BYTES = 32, 1024
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorFile:
    """One safetensors file: the header is kept, and only the data asked for are read.

    Tensors own their memory. With a memory map, every page that was ever touched would count as
    this process's memory; without one, safetensors reads a whole tensor to slice it.

    Raises UserError, naming the file, if it is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: this file is missing; fetch or rebuild it")
        try:
            with safe_open(str(path), framework="pt"):
                pass  # checks that the header is whole and the data fit it
            header = self.header()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); fetch or rebuild it"
            ) from error
        data = _LENGTH_BYTES + len(header)
        entries = json.loads(header)
        self.metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
        self._entries = {name: _Entry.of(entry, data) for name, entry in entries.items()}
        self.names = frozenset(self._entries)

    def header(self) -> bytes:
        """The header's bytes: JSON, padded with spaces."""
        with open(self.path, "rb") as file:
            return file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little"))

    def glimpse(self) -> bytes:
        """A few KiB from evenly spread places of the file."""
        step = max(1, self.path.stat().st_size // _GLIMPSES)
        with open(self.path, "rb") as file:
            return b"".join(
                os.pread(file.fileno(), _GLIMPSE_BYTES, i * step) for i in range(_GLIMPSES)
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Safetensors' name of a tensor's dtype (F32, BF16, U8 …), from the header alone."""
        return self._entry(name).dtype

    def torch_dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the header alone. Raises UserError if PyTorch does not have it."""
        return self._torch_dtype(name, self._entry(name))

    def size(self, name: str) -> int:
        """Bytes of a tensor, from the header alone."""
        return self._entry(name).size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the first dimension; the whole tensor by default."""
        entry = self._entry(name)
        return self._load(name, entry if entry.shape == () else entry.rows(start, stop))

    def read_index(self, name: str, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Slice `index` of the first dimension; of the next dimension, elements [start, stop)."""
        return self._load(name, self._entry(name).element(index).rows(start, stop))

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UserError(f"{self.path}: tensor {name!r} is missing; fetch or rebuild the file")
        return self._entries[name]

    def _torch_dtype(self, name: str, entry: _Entry) -> torch.dtype:
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} is stored as {entry.dtype}, which is not supported"
            )
        return _DTYPES[entry.dtype]

    def _load(self, name: str, entry: _Entry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=self._torch_dtype(name, entry))
        unread = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(entry.begin)
                # Linux reads at most 2 GiB at a time.
                while unread and (count := file.readinto(unread)):
                    unread = unread[count:]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if unread:
            raise UserError(f"{self.path}: was cut short while it was read; fetch or rebuild it")
        return tensor


class _Entry(NamedTuple):
    """Position of a tensor, or of a range of it. begin: first byte, from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @classmethod
    def of(cls, entry: dict[str, Any], data: int) -> _Entry:
        """An entry of a header, in a file whose data begin at byte `data`."""
        begin, end = entry["data_offsets"]
        return cls(entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)

    def rows(self, start: int, stop: int | None) -> _Entry:
        """Elements [start, stop) of the first dimension."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        count = max(stop - start, 0)
        size = self.size // max(self.shape[0], 1)
        return _Entry(self.dtype, (count, *self.shape[1:]), self.begin + start * size, count * size)

    def element(self, index: int) -> _Entry:
        """Element `index` of the first dimension, without that dimension."""
        assert 0 <= index < self.shape[0]
        row = self.rows(index, index + 1)
        return row._replace(shape=row.shape[1:])


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, fsync it, and rename it into place.

    Tensors are not copied first (safetensors before 0.8 did).

    metadata: at most one entry, which replaces the format entry that transformers expects in files
    it loads. safetensors writes several entries in an order that differs between runs, and the same
    input must give the same bytes.

    Raises UserError if the disk is full; the temporary file is then removed.
    """
    assert len(metadata) <= 1
    with _replacing(path) as temporary:
        # safetensors makes files that only their owner can read, but model folders are shared.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, str(temporary), metadata=metadata or {"format": "pt"})
        temporary.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, as atomically as `write_tensors`.

    Infinity, which JSON does not have, is written as transformers writes it in configs.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Half a surrogate pair, which UTF-8 does not have, becomes JSON's escape again.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as atomically as `write_tensors`."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, as atomically as `write_tensors`. Raises UserError if it cannot be read."""
    with _replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({first_line(error)}); fetch it again"
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError as `read_json` does, and for other values."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return value


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor in a safetensors file, from its header.

    Raises UserError as `TensorFile` does.
    """
    file = TensorFile(path)
    return {name: file.size(name) for name in file.names}


def largest_magnitude(tensor: Tensor) -> float:
    """The largest |x| of a tensor, NaN if it holds NaN. Zero for integers, float8, and if empty."""
    if tensor.dtype not in _CHECKED or not tensor.numel():
        return 0.0
    # NaN propagates through min and max. abs and isfinite would copy the tensor.
    least, largest = torch.aminmax(tensor)
    return max(-float(least), float(largest))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. Integers and float8 count as finite."""
    return math.isfinite(largest_magnitude(tensor))


def sha256_of(path: Path) -> str:
    """Hex digest of a file. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def check_writable(path: Path) -> None:
    """Raise UserError, before any work, if a file could not be written to `path` after it."""
    folder = path.parent
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; make it, or choose another place for {path.name}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written to; choose another place for {path.name}")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: synced and renamed to it after the block, or removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_error(path: Path, error: Exception) -> UserError:
    # safetensors turns I/O errors into text.
    full = getattr(error, "errno", None) in FULL_DISK or "No space" in str(error)
    if full:
        return UserError(f"{path.parent}: the disk is full; free some space and run again")
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be written ({reason})")
