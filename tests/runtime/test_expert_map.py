"""Checkpoints that store fewer experts than the model has: several of them share a stored one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints.restore import restore_checkpoint
from tests.checkpoints.regrouping import regroup
from tests.models import compress, dense_model, logits_of, relative_difference
from tests.ranks import run_on_ranks

TOLERANCE = 1e-4  # relative, float32
# Of four experts two are stored; in the second folder each is its group's centre.
EXPERT_MAP = [1, 0, 1, 1]


@pytest.fixture(params=["pruned", "empty"])
def merged(request, family_folder, tmp_path) -> Path:
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)
    return regroup(
        tmp_path / "c",
        tmp_path / "merged",
        [[0], [1]],
        codec=request.param,
        expert_map=EXPERT_MAP,
    )


def _logits_on_grid(folder: Path, ep: int, tp: int) -> torch.Tensor:
    return logits_of(load_model(folder, ep=ep, tp=tp))


def test_merged_experts_give_the_logits_of_the_restored_model(merged, tmp_path):
    restore_checkpoint(merged, tmp_path / "d")

    found = logits_of(load_model(merged))

    assert relative_difference(found, logits_of(dense_model(tmp_path / "d"))) <= TOLERANCE


@pytest.mark.slow
def test_merged_experts_are_served_on_a_grid(merged):
    expected = logits_of(load_model(merged))

    for found in run_on_ranks(4, _logits_on_grid, merged, 2, 2):
        assert relative_difference(found, expected) <= TOLERANCE
