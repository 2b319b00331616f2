"""What all ranks of a grid must have been given alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from resmoe_dist.checkpoints.format import INDEX_FILE, is_compressed
from resmoe_dist.config.commands import GridConfig

# Paths may differ from host to host. Of files, the content counts.
_MAY_DIFFER = {"json_file", "model", "prompts", "rank_timeout", "text", "token_ids"}


def facts_of(config: GridConfig, folder: Path | None, data: object) -> dict[str, str]:
    """Options by name, a digest of the checkpoint's index, and one of the data to work on.

    folder: the model's; None for the embedded one. data: what was read from files, as JSON can
    represent it.
    """
    facts = {
        config.shown_name(name): str(getattr(config, name))
        for name in type(config).model_fields
        if name not in _MAY_DIFFER
    }
    facts["the SHA-256 of the data"] = _digest(json.dumps(data).encode())
    if folder is not None:
        index = INDEX_FILE if is_compressed(folder) else "config.json"
        facts[f"the SHA-256 of the model's {index}"] = _digest((folder / index).read_bytes())
    return facts


def _digest(content: bytes) -> str:
    """Enough of a SHA-256 to tell files apart."""
    return hashlib.sha256(content).hexdigest()[:16]
