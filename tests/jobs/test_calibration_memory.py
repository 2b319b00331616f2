"""The memory of a calibration: one expert at a time, other weights mapped from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs.calibration import measure_activations
from tests.models import random_sequences


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch"])
def test_at_most_one_expert_is_in_memory(family_folder, monkeypatch, family):
    source = SourceCheckpoint(family_folder(family))
    read_expert = source.read_expert
    reads: list[tuple[int, int]] = []
    alive: list[StorageWeakRef] = []

    def watched(layer: int, expert: int):
        assert all(storage.expired() for storage in alive)
        reads.append((layer, expert))
        matrix_ID, bias_H = read_expert(layer, expert)
        alive.append(StorageWeakRef(matrix_ID.untyped_storage()))
        return matrix_ID, bias_H

    monkeypatch.setattr(source, "read_expert", watched)
    found = measure_activations(source, random_sequences(16, 16, 16, 16))

    # All sequences form one batch, so each expert that has tokens is read once.
    used = [(i, k) for i, layer in enumerate(found) for k in range(4) if layer.tokens_E[k]]
    assert sorted(reads) == used and len(used) > 4
    assert all(storage.expired() for storage in alive)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_weights_outside_the_experts_are_mapped_from_the_file(family_folder):
    folder = family_folder("mixtral")
    mapped: dict[str, bool] = {}

    def check_mapped(module, _args):
        mappings = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(folder / "model.safetensors"))
        ]
        for name, parameter in module.named_parameters():
            address = parameter.data_ptr()
            mapped[name] = any(begin <= address < end for begin, end in mappings)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(check_mapped)
    try:
        measure_activations(SourceCheckpoint(folder), random_sequences(8))
    finally:
        hook.remove()

    assert mapped["embed_tokens.weight"] and all(mapped.values())
    assert not any("experts" in name for name in mapped)
