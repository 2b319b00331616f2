"""The user's cached copies of the tiny models, trained on first use."""

from __future__ import annotations

import logging
from pathlib import Path

from resmoe_dist.errors import UserError
from resmoe_dist.testing.recipes import RECIPE_VERSION
from resmoe_dist.testing.training import train_tiny_model
from resmoe_dist.user_cache import cache_root

logger = logging.getLogger(__name__)


def cached_tiny_model(family: str = "mixtral", seed: int = 0) -> Path:
    """The folder of the family's tiny model in the user's cache, trained there on first use.

    Processes may call this at the same time: each trains, and the first to finish is kept.
    """
    directory = cache_root() / f"tiny-{family}-seed{seed}-v{RECIPE_VERSION}"
    if not (directory / "training.json").exists():
        # A warning, so that it is seen: a progress bar is shown on terminals only.
        logger.warning(
            "training the embedded %s model once, which takes minutes, into %s", family, directory
        )
        try:
            train_tiny_model(directory, family, seed)
        except UserError:
            # Another process may have finished first; anything else is a real error.
            if not (directory / "training.json").exists():
                raise
    return directory
