"""Reading a source model: its experts one at a time, the memory this takes, its fingerprint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.families.models import meta_model
from tests.checkpoints.damage import (
    INDEX,
    SHARDS,
    copy_of,
    edit_json,
    edit_tensors,
    edit_text,
    write_index,
)
from tests.checkpoints.resident import MIB, at_most_resident
from tests.models import FAMILIES

FIRST, SECOND = SHARDS


def test_sharded_model_reads_the_same_as_a_single_file(family_folder, shards):
    whole, sharded = SourceCheckpoint(family_folder("mixtral")), SourceCheckpoint(shards)

    assert sorted(sharded.other_names) == sorted(whole.other_names)
    for layer in range(2):
        for expert in range(4):
            found, expected = (s.read_expert(layer, expert)[0] for s in (sharded, whole))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_experts_read_the_same_as_separate_ones(family_folder, name):
    separate, fused = (SourceCheckpoint(family_folder(name, fused)) for fused in (False, True))

    for layer, site in enumerate(separate.sites):
        for expert in range(site.num_experts):
            found, expected = (s.read_expert(layer, expert) for s in (fused, separate))
            assert torch.equal(found[0], expected[0])
            assert (found[1] is None) == (expected[1] is None)
            assert found[1] is None or torch.equal(found[1], expected[1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("entries", [1, 50, 200])
def test_block_size_does_not_change_what_is_read(family_folder, name, fused, entries):
    folder = family_folder(name, fused)
    whole, _ = SourceCheckpoint(folder).read_expert(0, 2)

    in_blocks, _ = SourceCheckpoint(folder, block_entries=entries).read_expert(0, 2)

    assert torch.equal(in_blocks, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_expert_is_read_into_a_matrix_of_any_dtype(family_folder, dtype):
    source = SourceCheckpoint(family_folder("gpt_oss"))
    matrix, bias = source.read_expert(1, 2)
    matrices = torch.full((3, *matrix.shape), 7, dtype=dtype)

    bias_read = source.read_expert_into(1, 2, matrices[1])

    assert torch.equal(matrices[1], matrix.to(dtype))
    assert bool((matrices[[0, 2]] == 7).all())
    assert torch.equal(bias_read, bias)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_either_an_experts_or_another(family_folder, name, fused):
    source = SourceCheckpoint(family_folder(name, fused))

    experts = {
        tensor
        for site, storage in zip(source.sites, source.storages, strict=True)
        for tensor in storage.names(site.num_experts)
    }
    assert experts == {tensor for tensor in source.files.locations if ".experts." in tensor}
    assert not experts & set(source.other_names)
    assert experts | set(source.other_names) == set(source.files.locations)


ROWS, HIDDEN = 6144, 1024


@pytest.fixture
def large(tmp_path):
    """large(fused): a Mixtral of one layer and four experts of 36 MiB each in bfloat16."""

    def make(fused):
        config = MixtralConfig(
            hidden_size=HIDDEN,
            intermediate_size=ROWS,
            num_hidden_layers=1,
            num_local_experts=4,
            vocab_size=8,
            architectures=["MixtralForCausalLM"],
        )
        config.save_pretrained(tmp_path)
        others = {
            name: tensor.shape
            for name, tensor in meta_model(config).state_dict().items()
            if ".experts." not in name
        }
        if fused:
            shapes = {"gate_up_proj": (4, 2 * ROWS, HIDDEN), "down_proj": (4, HIDDEN, ROWS)}
            shapes = {f"model.layers.0.mlp.experts.{name}": s for name, s in shapes.items()}
        else:
            of_one = {"w1": (ROWS, HIDDEN), "w2": (HIDDEN, ROWS), "w3": (ROWS, HIDDEN)}
            shapes = {
                f"model.layers.0.block_sparse_moe.experts.{k}.{name}.weight": shape
                for k in range(4)
                for name, shape in of_one.items()
            }
        shapes |= others
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return SourceCheckpoint(tmp_path)

    return make


@pytest.mark.parametrize("fused", [False, True])
def test_reading_an_expert_takes_its_own_memory_and_a_few_mib(large, fused):
    source = large(fused)
    matrix = torch.zeros(ROWS, 3 * HIDDEN, dtype=torch.bfloat16)
    source.read_expert_into(0, 0, matrix)  # warms up the allocator

    with at_most_resident(12 * MIB):  # the size of one projection
        for expert in range(4):
            source.read_expert_into(0, expert, matrix)
    with at_most_resident(48 * MIB):  # one expert more
        for expert in range(4):
            source.read_expert(0, expert)


def test_fingerprint_does_not_change_when_the_folder_is_moved_or_copied(family_folder, shards):
    assert SourceCheckpoint(shards).fingerprint() == SourceCheckpoint(shards).fingerprint()

    moved = shards.rename(shards.with_name("elsewhere"))
    before = SourceCheckpoint(moved).fingerprint()
    copied = SourceCheckpoint(copy_of(moved, moved.with_name("copied")))
    (copied.folder / FIRST).touch()

    assert copied.fingerprint() == before
    assert before != SourceCheckpoint(family_folder("mixtral")).fingerprint()


def _change_config(folder):
    edit_json(folder / "config.json", lambda config: config.update(rope_theta=3.0))


def _rename_shard(folder):
    (folder / SECOND).rename(folder / "renamed.safetensors")
    edit_text(folder / INDEX, (folder / INDEX).read_text().replace(SECOND, "renamed.safetensors"))


def _change_dtype(folder):
    edit_tensors(folder / SECOND, _halve_lm_head)


def _halve_lm_head(tensors):
    name = next(name for name, tensor in tensors.items() if tensor.shape == (64, 20))
    tensors[name] = tensors[name].half()


def _swap_shards(folder):
    for old, new in ((FIRST, "x"), (SECOND, FIRST), ("x", SECOND)):
        (folder / old).rename(folder / new)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    swapped = {FIRST: SECOND, SECOND: FIRST}
    write_index(folder, {name: swapped[file] for name, file in weight_map.items()})


@pytest.mark.parametrize("change", [_change_config, _rename_shard, _change_dtype, _swap_shards])
def test_fingerprint_changes_with_the_model(shards, change):
    before = SourceCheckpoint(shards).fingerprint()

    change(shards)

    assert SourceCheckpoint(shards).fingerprint() != before
