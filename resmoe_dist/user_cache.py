"""The folder that keeps a user's models, kernels and measurements between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """This user's cache folder, which need not exist yet: RESMOE_CACHE, or in XDG_CACHE_HOME."""
    if root := os.environ.get("RESMOE_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resmoe-dist"
