"""What is wrong with a source model is said in one line that names the file and the tensor."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.families import storage as expert_storage
from tests.checkpoints.damage import (
    copy_of,
    edit_json,
    edit_tensors,
    edit_text,
    mistake,
    sharded_copy,
    truncate,
    write_index,
)
from tests.checkpoints.resident import MIB, at_most_resident
from tests.models import FAMILIES, compress

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture
def mixtral(family_folder, tmp_path):
    return copy_of(family_folder("mixtral"), tmp_path / "source")


@pytest.fixture
def fused_mixtral(family_folder, tmp_path):
    return copy_of(family_folder("mixtral", fused=True), tmp_path / "source")


@pytest.fixture
def shards(family_folder, tmp_path):
    return sharded_copy(family_folder("mixtral"), tmp_path / "source")


def test_a_sharded_model_reads_as_the_single_file_does(family_folder, shards):
    whole, sharded = SourceCheckpoint(family_folder("mixtral")), SourceCheckpoint(shards)

    assert sorted(sharded.other_names) == sorted(whole.other_names)
    for layer in range(2):
        for expert in range(4):
            found, expected = (s.read_expert(layer, expert)[0] for s in (sharded, whole))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_model_reads_as_the_one_with_separate_experts_does(family_folder, name):
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
def test_what_is_read_does_not_depend_on_the_pieces_it_is_read_in(
    family_folder, monkeypatch, name, fused, entries
):
    source = SourceCheckpoint(family_folder(name, fused))
    whole, _ = source.read_expert(0, 2)

    monkeypatch.setattr(expert_storage, "_ENTRIES_AT_ONCE", entries)

    assert torch.equal(source.read_expert(0, 2)[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_expert_is_read_into_a_matrix_of_any_dtype(family_folder, dtype):
    source = SourceCheckpoint(family_folder("gpt_oss"))
    matrix, bias = source.read_expert(1, 2)
    among_others = torch.full((3, *matrix.shape), 7, dtype=dtype)

    bias_read = source.read_expert_into(1, 2, among_others[1])

    assert torch.equal(among_others[1], matrix.to(dtype))
    assert bool((among_others[[0, 2]] == 7).all())
    assert torch.equal(bias_read, bias)


@pytest.fixture
def large(tmp_path):
    """large(fused): a Mixtral of one layer and four experts of 36 MiB each in bfloat16."""

    def make(fused):
        rows, hidden = 6144, 1024
        config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=rows,
            num_hidden_layers=1,
            num_local_experts=4,
            architectures=["MixtralForCausalLM"],
        )
        config.save_pretrained(tmp_path)
        if fused:
            shapes = {"gate_up_proj": (4, 2 * rows, hidden), "down_proj": (4, hidden, rows)}
            shapes = {f"model.layers.0.mlp.experts.{name}": s for name, s in shapes.items()}
        else:
            shapes = {
                f"model.layers.0.block_sparse_moe.experts.{k}.{name}.weight": shape
                for k in range(4)
                for name, shape in {
                    "w1": (rows, hidden),
                    "w2": (hidden, rows),
                    "w3": (rows, hidden),
                }.items()
            }
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return SourceCheckpoint(tmp_path)

    return make


@pytest.mark.parametrize("fused", [False, True])
def test_reading_experts_takes_less_memory_than_one_projection_besides(large, fused):
    source = large(fused)
    matrix = torch.zeros(6144, 3 * 1024, dtype=torch.bfloat16)
    source.read_expert_into(0, 0, matrix)  # the allocator's own reserve grows once

    with at_most_resident(12 * MIB):
        for expert in range(4):
            source.read_expert_into(0, expert, matrix)
    with at_most_resident(48 * MIB):
        for expert in range(4):
            source.read_expert(0, expert)


def test_a_fingerprint_is_the_same_for_a_copy_elsewhere(family_folder, shards):
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


def _change_shape(folder):
    edit_tensors(folder / SECOND, _transpose_lm_head)


def _transpose_lm_head(tensors):
    name = next(name for name, tensor in tensors.items() if tensor.shape == (64, 20))
    tensors[name] = tensors[name].T.contiguous()


def _swap_shards(folder):
    for old, new in ((FIRST, "x"), (SECOND, FIRST), ("x", SECOND)):
        (folder / old).rename(folder / new)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    swapped = {FIRST: SECOND, SECOND: FIRST}
    write_index(folder, {name: swapped[file] for name, file in weight_map.items()})


@pytest.mark.parametrize("change", [_change_config, _rename_shard, _change_shape, _swap_shards])
def test_a_fingerprint_is_another_for_another_model(shards, change):
    before = SourceCheckpoint(shards).fingerprint()

    change(shards)

    assert SourceCheckpoint(shards).fingerprint() != before


def test_missing_folder(tmp_path):
    with mistake(f"{tmp_path}/none: no such folder"):
        SourceCheckpoint(tmp_path / "none")


def test_missing_config(mixtral):
    (mixtral / "config.json").unlink()
    with mistake(f"{mixtral}.*not a readable Hugging Face model folder"):
        SourceCheckpoint(mixtral)


@pytest.mark.parametrize("text", ["{broken", "", "[]", "3", '{"model_type": "no-such-model"}'])
def test_config_that_is_none(mixtral, text):
    edit_text(mixtral / "config.json", text)
    with mistake(f"{mixtral}.*not a readable Hugging Face model folder"):
        SourceCheckpoint(mixtral)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "wide"), ("num_local_experts", -1), ("hidden_act", "no-such-activation")],
)
def test_config_with_a_value_no_model_can_be_built_with(mixtral, key, value):
    edit_json(mixtral / "config.json", lambda config: config.update({key: value}))
    with mistake(f"{mixtral}"):
        SourceCheckpoint(mixtral)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["MixtralConfig"]])
def test_config_that_names_no_model_class(mixtral, architectures):
    edit_json(mixtral / "config.json", lambda config: config.update(architectures=architectures))
    with mistake("config.json: 'architectures' is"):
        SourceCheckpoint(mixtral)


def test_compressed_model(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    with mistake(f"{tmp_path}/c: compressed already.*give the model it was made from"):
        SourceCheckpoint(tmp_path / "c")


def test_model_without_experts(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with mistake("a 'llama' model has no experts to compress"):
        SourceCheckpoint(tmp_path / "llama")


def test_weights_that_are_not_safetensors(mixtral):
    (mixtral / "model.safetensors").rename(mixtral / "pytorch_model.bin")
    with mistake(f"{mixtral}: holds neither model.safetensors nor {INDEX}"):
        SourceCheckpoint(mixtral)


def test_missing_shard(shards):
    (shards / SECOND).unlink()
    with mistake(f"{shards / SECOND}: this file is missing"):
        SourceCheckpoint(shards)


@pytest.mark.parametrize("part", ["length", "header", "data", "last byte"])
def test_truncated_shard(shards, part):
    size = (shards / SECOND).stat().st_size
    sizes = {"length": 5, "header": 100, "data": size // 2, "last byte": size - 1}
    truncate(shards / SECOND, sizes[part])
    with mistake(f"{shards / SECOND}: not a whole safetensors file"):
        SourceCheckpoint(shards)


@pytest.mark.parametrize(
    "text", ["{broken", "[1]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"x": 1}}', "\xff"]
)
def test_index_that_is_none(shards, text):
    (shards / INDEX).write_bytes(text.encode("latin-1"))
    with mistake(f"{shards / INDEX}: "):
        SourceCheckpoint(shards)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "..", ""])
def test_index_that_leads_out_of_the_folder(shards, name):
    shutil.copy(shards / FIRST, shards.parent / "evil.safetensors")
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    write_index(shards, weight_map | {next(iter(weight_map)): name})
    with mistake(f"{shards / INDEX}: {name!r} is not a plain file name"):
        SourceCheckpoint(shards)


def test_index_that_promises_a_tensor_its_shard_has_not(shards):
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    moved = next(name for name, where in weight_map.items() if where == FIRST)
    write_index(shards, weight_map | {moved: SECOND})
    with mistake(f"{shards / SECOND}: tensor '{re.escape(moved)}' is missing"):
        SourceCheckpoint(shards)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_no_number_in_an_expert_of_its_own(mixtral, value):
    edit_tensors(mixtral / "model.safetensors", lambda t: t[EXPERT][5, 7].fill_(value))
    source = SourceCheckpoint(mixtral)

    source.read_expert(0, 2)
    with mistake(f"{mixtral}/model.safetensors: tensor '{re.escape(EXPERT)}' holds NaN or inf"):
        source.read_expert(0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_no_number_in_a_fused_tensor(fused_mixtral, value):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit_tensors(fused_mixtral / "model.safetensors", lambda t: t[name][2, 5, 7].fill_(value))
    source = SourceCheckpoint(fused_mixtral)

    source.read_expert(1, 1)
    with mistake(f"{fused_mixtral}/model.safetensors: tensor '{re.escape(name)}\\[2\\]' holds NaN"):
        source.read_expert(1, 2)


def test_not_a_number_in_a_bias(family_folder, tmp_path):
    source = copy_of(family_folder("gpt_oss"), tmp_path / "source")
    name = "model.layers.0.mlp.experts.down_proj_bias"
    edit_tensors(source / "model.safetensors", lambda t: t[name][1, 3].fill_(float("nan")))
    with mistake(f"{source}/model.safetensors: tensor '{re.escape(name)}\\[1\\]' holds NaN"):
        SourceCheckpoint(source).read_expert(0, 1)


def test_expert_of_another_shape_than_config_says(mixtral):
    edit_tensors(
        mixtral / "model.safetensors",
        lambda t: t.update({EXPERT: t[EXPERT][:, :26].contiguous()}),
    )
    shape = re.escape(f"'{EXPERT}' has shape [20, 26], config.json asks for [20, 27]")
    with mistake(f"{mixtral}/model.safetensors: tensor {shape}"):
        SourceCheckpoint(mixtral)


def test_config_of_another_size_than_the_weights(fused_mixtral):
    edit_json(fused_mixtral / "config.json", lambda config: config.update(intermediate_size=28))
    with mistake(r"has shape \[4, 20, 27\], config.json asks for \[4, 20, 28\]"):
        SourceCheckpoint(fused_mixtral)


def test_missing_tensor_of_one_expert(mixtral):
    edit_tensors(mixtral / "model.safetensors", lambda t: t.pop(EXPERT))
    with mistake(f"{mixtral}: tensor '{re.escape(EXPERT)}' is missing"):
        SourceCheckpoint(mixtral)


def test_missing_projection_of_a_layer(fused_mixtral):
    edit_tensors(
        fused_mixtral / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.experts.down_proj")
    )
    with mistake(r"model.layers.1.mlp.experts: found expert tensors \['inputs'\]"):
        SourceCheckpoint(fused_mixtral)


def test_missing_layer(mixtral):
    edit_tensors(
        mixtral / "model.safetensors",
        lambda t: [t.pop(name) for name in list(t) if "layers.1." in name and "experts" in name],
    )
    with mistake("model.layers.1.mlp.experts: found expert tensors of no known name"):
        SourceCheckpoint(mixtral)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_experts_on_disk_than_config_says(family_folder, tmp_path, fused, count):
    source = copy_of(family_folder("mixtral", fused), tmp_path / "source")
    edit_json(source / "config.json", lambda config: config.update(num_local_experts=count))
    with mistake(r"experts.*(is missing|config.json|has shape)"):
        SourceCheckpoint(source)


def test_stored_type_that_is_not_supported(mixtral):
    edit_tensors(
        mixtral / "model.safetensors",
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
    )
    with mistake(f"'{re.escape(EXPERT)}' is stored as F8_E4M3; supported are F32, F16, BF16"):
        SourceCheckpoint(mixtral)


def test_experts_of_one_layer_in_several_dtypes(mixtral):
    edit_tensors(
        mixtral / "model.safetensors", lambda t: t.update({EXPERT: t[EXPERT].to(torch.bfloat16)})
    )
    with mistake(f"'{re.escape(EXPERT)}' is stored as BF16"):
        SourceCheckpoint(mixtral)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_tensor_is_found_and_none_is_left_among_the_others(family_folder, name, fused):
    source = SourceCheckpoint(family_folder(name, fused))

    experts = {
        tensor
        for site, storage in zip(source.sites, source.storages, strict=True)
        for tensor in storage.names(site.num_experts)
    }
    assert experts == {tensor for tensor in source.files.locations if ".experts." in tensor}
    assert not experts & set(source.other_names)
    assert experts | set(source.other_names) == set(source.files.locations)
