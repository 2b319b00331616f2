"""Families that differ from most in how they call experts or divide layers, on a grid."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.runtime.loading import load_model
from tests.all_families import tiny_model
from tests.families.test_all_families import outputs_of
from tests.models import compress, relative_difference
from tests.ranks import run_on_ranks

FAMILIES = [
    "llama4",
    "dbrx",
    "step3p7",
    "nllb_moe",
    "longcat_flash",
    "diffusion_gemma",
    # Scaled embeddings; linear attention beside full attention.
    "gemma4",
    "glm5_next",
]


def _outputs_on_a_rank(folder, ep, tp, lanes):
    return {
        family: outputs_of(load_model(folder / family / "c", ep=ep, tp=tp, lanes=lanes))
        for family in FAMILIES
    }


@pytest.mark.slow
def test_a_grid_gives_the_outputs_of_one_process(tmp_path):
    expected = {}
    for family in FAMILIES:
        model = tiny_model(family)
        expected[family] = outputs_of(model)
        model.save_pretrained(tmp_path / family / "s")
        compress(tmp_path / family / "s", tmp_path / family / "c", 2, keep=1.0, dtype="float32")

    for grid in ((2, 2, 1), (2, 2, 2)):
        for found in run_on_ranks(4, _outputs_on_a_rank, tmp_path, *grid):
            for family in FAMILIES:
                assert relative_difference(found[family], expected[family]) < 1e-4, (family, grid)
                assert torch.isfinite(found[family]).all()
