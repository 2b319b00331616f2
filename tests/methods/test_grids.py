"""Folders of methods with codecs of their own are served on a grid and in every execution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.runtime.planning import execution_for
from tests.methods.folders import TOLERANCE, compress, settings
from tests.models import dense_model, logits_of, relative_difference
from tests.ranks import run_on_ranks

# With these budgets all four experts are stored, which divide over two ranks.
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "rtn": (0.5, {"bits": 3, "group_size": 16}),
    "mc_smoe": (0.5, {"share": 0.5}),
    "mobe": (0.8, {"steps": 3}),
}


def _compressed(source: Path, folder: Path, name: str) -> torch.Tensor:
    """Compress, and return the logits of the dense model that the folder restores to."""
    keep, options = METHODS[name]
    compress(source, folder, settings(source, name, keep, **options))
    restore_checkpoint(folder, folder.with_name(f"{name}-dense"))
    return logits_of(dense_model(folder.with_name(f"{name}-dense")))


def _logits_on_grid(folders: list[Path], ep: int, tp: int) -> list[torch.Tensor]:
    return [logits_of(load_model(folder, ep=ep, tp=tp)) for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_methods_are_served_on_a_grid(family_folder, tmp_path, family):
    folders = [tmp_path / name for name in METHODS]
    expected = [_compressed(family_folder(family), folder, folder.name) for folder in folders]

    for rank, found in enumerate(run_on_ranks(4, _logits_on_grid, folders, 2, 2)):
        for folder, mine, want in zip(folders, found, expected, strict=True):
            assert relative_difference(mine, want) <= TOLERANCE, f"rank {rank}, {folder.name}"


@pytest.mark.parametrize("execution", ["restore", "shared", "tiled", "cached", "auto"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_run_in_every_execution(family_folder, tmp_path, name, execution):
    expected = _compressed(family_folder("gpt_oss"), tmp_path / name, name)
    cache = 1 << 20 if execution == "cached" else 0

    found = logits_of(load_model(tmp_path / name, execution=execution_for(execution, cache)))

    assert relative_difference(found, expected) <= TOLERANCE
