"""One message for each way in which a disk refuses a write."""

from __future__ import annotations

from pathlib import Path

from resmoe_dist.checkpoints.tensor_files import FULL_DISK
from resmoe_dist.errors import UserError


def disk_error(path: Path, error: OSError, action: str = "written") -> UserError:
    """Return the error to raise from `error`: the disk is full, or `path` cannot be `action`."""
    if error.errno in FULL_DISK:
        return UserError(f"{path}: the disk is full; free some space and run again")
    return UserError(f"{path}: cannot be {action} ({error.strerror})")
