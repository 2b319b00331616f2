"""Sizes and shares as users write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str | int) -> int:
    """Bytes of `8GB`, `512MiB`, `2e9` …. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(text), re.IGNORECASE)
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError("not a size; write 8GB or 7500MiB")
    return size


def parse_share(value: str | float) -> float:
    """0.35 of `0.35` or `35%`. Raises ValueError for anything else."""
    try:
        if isinstance(value, str) and value.endswith("%"):
            return float(value.removesuffix("%")) / 100
        return float(value)
    except ValueError:
        raise ValueError("not a share; write 0.35 or 35%") from None
