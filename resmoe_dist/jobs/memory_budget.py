"""How much memory the compression of a group takes, and how it stays within `--max-memory`.

Legend: E experts of the group, I intermediate rows, D design-matrix columns.
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
_SCRATCH_BYTES = 400 * 1024**2
# Blocks of products between rows.
_SCRATCH_BYTES_PER_ROW = 16 * 1024


def resident_bytes() -> int:
    """Return this process's anonymous memory: all that the system cannot drop as page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


@dataclass(frozen=True)
class GroupMemory:
    """Bytes of memory that the compression of one group takes.

    expert_bytes: the experts as read. working_bytes: everything else.
    """

    expert_bytes: int
    working_bytes: int

    @classmethod
    def estimate(
        cls,
        count: int,
        rows: int,
        columns: int,
        itemsize: int,
        *,
        stored_bytes: int,
        aligns: bool,
        encoding_bytes: int = 0,
    ) -> GroupMemory:
        """Estimate the memory for `count` experts [I, D] whose values take `itemsize` bytes.

        stored_bytes: bytes of the compressed group. aligns: whether rows are aligned. That takes
        the sum of the experts in float32, and either two matrices [I, D] of 8-bit integers or one
        matrix [I, I] in float64 for the solver. encoding_bytes: of the codec, for one expert.
        """
        matrix = rows * columns
        align = 0
        if aligns:
            products = max(2 * matrix, 8 * rows * rows)
            align = 4 * matrix + products + rows * _SCRATCH_BYTES_PER_ROW
        # All of the compressed group, and the parts of one expert before they are joined.
        encode = stored_bytes + stored_bytes // count + encoding_bytes
        return cls(count * matrix * itemsize, max(align, encode) + _SCRATCH_BYTES)


class ExpertStore:
    """Allocates the tensor [E, I, D] for the experts of a group: in memory, or in a mapped file.

    folder: where the file is made. It is unlinked as soon as it is mapped.
    max_bytes: the anonymous memory that this process may use; None for no bound.
    """

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def allocate(
        self, need: GroupMemory, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor:
        """Return an uninitialised tensor. It is mapped from a file if memory would not suffice.

        Raises UserError if the rest of the work exceeds the bound, or if the disk is full.
        """
        if self.max_bytes is None:
            return torch.empty(shape, dtype=dtype)
        available = self.max_bytes - resident_bytes() - need.working_bytes
        if available >= need.expert_bytes:
            return torch.empty(shape, dtype=dtype)
        if available < 0:
            needed_gib = math.ceil((self.max_bytes - available) / 1024**3 * 10) / 10
            raise UserError(
                f"--max-memory: a group of {shape[0]} experts takes {needed_gib:.1f} GiB on each "
                "rank; allow as much, start fewer ranks, or use smaller groups (a larger --ep)"
            )
        # A hidden name: a resumed run deletes such files if this process is killed just now.
        path = self.folder / f".experts-{uuid.uuid4().hex}"
        size = math.prod(shape)
        try:
            _reserve(path, size * dtype.itemsize)
            # The mapping stays valid after the file is unlinked.
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        finally:
            path.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes and reserve its disk blocks.

    Without the blocks, a write to the mapping would kill the process when the disk is full.
    """
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL_DISK else error.strerror
        raise UserError(
            f"{path.parent}: no room for a group's experts ({reason}); free some space "
            "or allow more --max-memory"
        ) from error
