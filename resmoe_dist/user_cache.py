"""Where this user's models, kernels and measurements are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of this user's cache; not made here."""
    if root := os.environ.get("RESMOE_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resmoe-dist"
