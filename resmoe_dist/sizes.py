"""Sizes as users write them."""

from __future__ import annotations

import re

from resmoe_dist.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str, option: str = "--max-memory") -> int:
    """Bytes of `8GB`, `512MiB`, `2e9` …. Raises UserError for anything else, naming the option."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{option} {text}: not a size; write 8GB or 7500MiB")
    return size
