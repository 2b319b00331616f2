"""Safetensors files: opened once, read by slices, written atomically; errors a user can act on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resmoe_dist.errors import UserError

_HASH_CHUNK = 1 << 22


class TensorFile:
    """One safetensors file, memory-mapped: what is not sliced is not read.

    Raises UserError, naming the file, where it is missing, truncated or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: this file is missing; fetch or rebuild it")
        try:
            self._handle = safe_open(str(path), framework="pt")
            self.names = frozenset(self._handle.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); fetch or rebuild it"
            ) from error

    @property
    def metadata(self) -> dict[str, str]:
        """The free-form strings of the header."""
        return self._handle.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Safetensors' name of a tensor's dtype (F32, BF16, U8 …), from the header alone."""
        return self._slice(name).get_dtype()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the first dimension; the whole tensor by default."""
        if start == 0 and stop is None:
            self._slice(name)
            return self._handle.get_tensor(name)
        return self._slice(name)[start:stop]

    def read_index(self, name: str, index: int) -> Tensor:
        """Slice `index` of the first dimension, that dimension dropped."""
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        try:
            return self._handle.get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self.path}: tensor {name!r} is missing; fetch or rebuild the file"
            ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, fsync it, and rename it into place.

    metadata: at most one entry, which takes the place of the format that transformers asks for in
    files it loads: safetensors writes several in an order that differs from run to run, and the
    same input shall give the same bytes.

    Raises UserError when the disk is full; the temporary file is then gone.
    """
    assert len(metadata) <= 1
    with _replacing(path) as temporary:
        # safetensors leaves files that only their owner may read; others share a model folder.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, str(temporary), metadata=metadata or {"format": "pt"})
        temporary.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, as atomically as `write_tensors`."""
    with _replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, as atomically as `write_tensors`. Raises UserError where it is not readable."""
    with _replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError where it is missing or none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); fetch it again") from error


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor in a safetensors file, as its header says.

    Raises UserError as `TensorFile` does.
    """
    TensorFile(path)  # the header is whole, and the data fit it
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: end - begin for name, (begin, end) in spans.items()}


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: synced and renamed to it after the block, or gone."""
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
    # safetensors reports I/O errors as text of its own.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
    if full:
        return UserError(f"{path.parent}: the disk is full; free some space and run again")
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be written ({reason})")
