"""Activation statistics are saved to one file and loaded from it."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import load_activations, save_activations
from resmoe_dist.jobs.calibration import measure_activations
from tests.checkpoints.damage import mistake
from tests.models import random_sequences


def test_loaded_statistics_equal_the_saved_ones(family_folder, tmp_path):
    source = SourceCheckpoint(family_folder("switch"))
    layers = measure_activations(source, random_sequences(9, 4))

    save_activations(tmp_path / "activations.safetensors", source.sites, layers)
    found = load_activations(tmp_path / "activations.safetensors", source.sites)

    assert len(found) == len(layers) == 2
    for mine, theirs in zip(found, layers, strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
        assert all(torch.equal(vars(mine)[part], vars(theirs)[part]) for part in vars(mine))


@pytest.mark.parametrize(
    ("other", "message"),
    [("qwen3_moe", "another model's statistics"), ("switch", "encoder.*is missing")],
)
def test_statistics_of_another_model_are_refused(family_folder, tmp_path, other, message):
    source = SourceCheckpoint(family_folder("mixtral"))
    layers = measure_activations(source, random_sequences(8))
    save_activations(tmp_path / "activations.safetensors", source.sites, layers)

    with mistake(message):
        load_activations(
            tmp_path / "activations.safetensors", SourceCheckpoint(family_folder(other)).sites
        )
