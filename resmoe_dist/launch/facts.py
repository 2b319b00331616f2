"""What all ranks of a grid must have been given alike."""

from __future__ import annotations

import hashlib
import json

from resmoe_dist.checkpoints.format import INDEX_FILE
from resmoe_dist.config.grid import GridConfig
from resmoe_dist.runtime.served_folder import ServedFolder

# Paths may differ from host to host. Of files, the content counts.
_MAY_DIFFER = {"json_file", "model", "prompts", "rank_timeout", "task_folder", "text", "token_ids"}


def facts_of(config: GridConfig, served: ServedFolder | None, data: object) -> dict[str, str]:
    """Options by name, a digest of the checkpoint's index, and one of the data to work on.

    served: the model; None for the embedded one. data: what was read from files, as JSON can
    represent it.
    """
    facts = {
        config.shown_name(name): str(getattr(config, name))
        for name in type(config).model_fields
        if name not in _MAY_DIFFER
    }
    facts["the digest of the data"] = _digest(json.dumps(data).encode())
    if served is not None and served.index is not None:
        facts[f"the digest of the model's {INDEX_FILE}"] = _digest(
            served.index.model_dump_json().encode()
        )
    elif served is not None:
        facts["the digest of the model's config.json"] = _digest(
            served.config.to_json_string().encode()
        )
    return facts


def _digest(content: bytes) -> str:
    """Enough of a SHA-256 to tell files apart."""
    return hashlib.sha256(content).hexdigest()[:16]
