"""A codec that a test registers is served on a grid, as a centre and as a residual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tests.codecs.rounded_codec  # noqa: F401  (registers codec `rounded`)
from resmoe_dist import load_model
from resmoe_dist.checkpoints.restore import restore_checkpoint
from tests.models import compress, dense_model, logits_of, relative_difference
from tests.ranks import run_on_ranks

TOLERANCE = 1e-4  # relative, float32
CODECS = {
    "residual": {"codec": "rounded"},
    "centre": {"center_codec": "rounded"},
    "both": {"codec": "rounded", "center_codec": "rounded"},
}


def _logits_on_grid(folders: list[Path], ep: int, tp: int) -> list[torch.Tensor]:
    return [logits_of(load_model(folder, ep=ep, tp=tp)) for folder in folders]


@pytest.mark.slow
def test_a_registered_codec_is_served_on_a_grid(family_folder, tmp_path):
    folders, expected = [], []
    for name, codecs in CODECS.items():
        folders.append(tmp_path / name)
        compress(family_folder("mixtral"), folders[-1], groups=2, **codecs)
        restore_checkpoint(folders[-1], tmp_path / f"{name}-dense")
        expected.append(logits_of(dense_model(tmp_path / f"{name}-dense")))

    for rank, found in enumerate(run_on_ranks(4, _logits_on_grid, folders, 2, 2)):
        for folder, mine, want in zip(folders, found, expected, strict=True):
            assert relative_difference(mine, want) <= TOLERANCE, f"rank {rank}, {folder.name}"


@pytest.mark.parametrize("execution", ["restore", "shared", "tiled", "auto"])
def test_a_registered_codec_runs_in_every_execution(family_folder, tmp_path, execution):
    from resmoe_dist.runtime.planning import execution_for

    compress(family_folder("mixtral"), tmp_path / "c", groups=2, **CODECS["both"])
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    found = logits_of(load_model(tmp_path / "c", execution=execution_for(execution)))

    assert relative_difference(found, logits_of(dense_model(tmp_path / "d"))) <= TOLERANCE
