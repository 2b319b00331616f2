"""What is wrong with a source model is reported in one line that names the file and the tensor."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from resmoe_dist.checkpoints.source import SourceCheckpoint
from tests.checkpoints.damage import (
    INDEX,
    SHARDS,
    copy_of,
    edit_json,
    edit_tensors,
    edit_text,
    mistake,
    truncate,
    write_index,
)
from tests.models import compress

FIRST, SECOND = SHARDS
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


def test_missing_folder(tmp_path):
    with mistake(f"{tmp_path}/none: no such folder"):
        SourceCheckpoint(tmp_path / "none")


def test_missing_config(mixtral):
    (mixtral / "config.json").unlink()
    with mistake(f"{mixtral}.*not a readable Hugging Face model folder"):
        SourceCheckpoint(mixtral)


@pytest.mark.parametrize("text", ["{broken", "", "[]", "3", '{"model_type": "no-such-model"}'])
def test_unreadable_config(mixtral, text):
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
def test_unreadable_index(shards, text):
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


def test_index_names_a_tensor_missing_from_its_shard(shards):
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    moved = next(name for name, where in weight_map.items() if where == FIRST)
    write_index(shards, weight_map | {moved: SECOND})
    with mistake(f"{shards / SECOND}: tensor '{re.escape(moved)}' is missing"):
        SourceCheckpoint(shards)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_value_in_a_separate_expert(mixtral, value):
    edit_tensors(mixtral / "model.safetensors", lambda t: t[EXPERT][5, 7].fill_(value))
    source = SourceCheckpoint(mixtral)

    source.read_expert(0, 2)
    with mistake(f"{mixtral}/model.safetensors: tensor '{re.escape(EXPERT)}' holds NaN or inf"):
        source.read_expert(0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_value_in_a_fused_tensor(fused_mixtral, value):
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
    with mistake(r"has shape \[4, 54, 20\], config.json asks for \[4, 56, 20\]"):
        SourceCheckpoint(fused_mixtral)


def test_missing_tensor_of_one_expert(mixtral):
    edit_tensors(mixtral / "model.safetensors", lambda t: t.pop(EXPERT))
    with mistake(f"{mixtral}: tensor '{re.escape(EXPERT)}' is missing"):
        SourceCheckpoint(mixtral)


def test_missing_projection_of_a_layer(fused_mixtral):
    edit_tensors(
        fused_mixtral / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.experts.down_proj")
    )
    with mistake("no tensors of the checkpoint become 'model.layers.1.mlp.experts.down_proj'"):
        SourceCheckpoint(fused_mixtral)


def test_missing_layer(mixtral):
    edit_tensors(
        mixtral / "model.safetensors",
        lambda t: [t.pop(name) for name in list(t) if "layers.1." in name and "experts" in name],
    )
    with mistake("no tensors of the checkpoint become 'model.layers.1.mlp.experts.gate_up_proj'"):
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
