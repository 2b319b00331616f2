"""What compressing a group takes in memory, and keeping that under a bound.

Legend: N experts of the group, I rows, D columns.
"""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import FULL_DISK
from resmoe_dist.errors import UserError

# Blocks of entries, a sample of them, and what the allocator keeps in reserve.
_SCRATCH = 400 * 1024**2
# Of each row, for blocks of products.
_SCRATCH_PER_ROW = 16 * 1024


def resident_bytes() -> int:
    """Anonymous memory of this process: what it cannot give back as page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells RssAnon")


@dataclass(frozen=True)
class GroupMemory:
    """Bytes that compressing one group takes: its experts as read, and everything beside them."""

    experts: int
    beside: int

    @classmethod
    def of(
        cls, count: int, rows: int, columns: int, itemsize: int, *, stored: int, solves: bool
    ) -> GroupMemory:
        """Of `count` experts [rows, columns] read in `itemsize` bytes.

        stored: bytes of the compressed group. solves: rows are aligned, with the sum of the experts
        in float32, and two matrices of 8-bit integers or one I × I matrix for the solver.
        """
        matrix = rows * columns
        align = solves * (4 * matrix + max(2 * matrix, 8 * rows * rows) + rows * _SCRATCH_PER_ROW)
        # One expert more than is stored: its parts, then the whole.
        encode = stored + stored // count
        return cls(count * matrix * itemsize, max(align, encode) + _SCRATCH)


class ExpertStore:
    """Room for a group's experts [N, I, D]: in memory, or in a file where a bound asks for it.

    at_most: bytes of anonymous memory that this process may hold; None for no bound. folder: where
    the file is made; it has no name there any more once it is open.
    """

    def __init__(self, folder: Path, at_most: int | None) -> None:
        self._folder, self._at_most = folder, at_most

    def room(self, need: GroupMemory, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor. Raises UserError where even a file does not help."""
        if self._at_most is None:
            return torch.empty(shape, dtype=dtype)
        left = self._at_most - resident_bytes() - need.beside
        if left >= need.experts:
            return torch.empty(shape, dtype=dtype)
        if left < 0:
            least = math.ceil((self._at_most - left) / 1024**3 * 10) / 10
            raise UserError(
                f"--max-memory: a group of {shape[0]} experts takes {least:.1f} GiB on each rank; "
                "allow as much, start fewer ranks, or use smaller groups (a larger --ep)"
            )
        # Hidden, as all that a resumed run clears away if this one is killed just now.
        path = self._folder / f".experts-{uuid.uuid4().hex}"
        size = shape[0] * shape[1] * shape[2]
        try:
            self._reserve(path, size * dtype.itemsize)
            # The mapping outlives the name.
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        finally:
            path.unlink(missing_ok=True)

    @staticmethod
    def _reserve(path: Path, size: int) -> None:
        """Make a file of `size` bytes. In one with holes, a full disk would end the process."""
        try:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            reason = "the disk is full" if error.errno in FULL_DISK else error.strerror
            raise UserError(
                f"{path.parent}: no room for a group's experts ({reason}); free some space "
                "or allow more --max-memory"
            ) from error
