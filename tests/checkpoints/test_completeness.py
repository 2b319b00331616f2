"""A checkpoint holds what its model needs, in the range of its dtype, or is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from tests.checkpoints.damage import (
    FORMAT,
    INDEX,
    SHARDS,
    edit_json,
    edit_tensors,
    mistake,
    sharded_copy,
    write_index,
)
from tests.models import FAMILIES, compress, dense_model, logits_of, save_family

FIRST, SECOND = SHARDS
NORM = "model.norm.weight"


@pytest.fixture
def tied(tmp_path):
    """A Mixtral in two shards whose head is its embedding."""
    save_family(FAMILIES["mixtral"], tmp_path / "whole", tie_word_embeddings=True)
    return sharded_copy(tmp_path / "whole", tmp_path / "tied")


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        NORM,
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    ],
)
def test_missing_tensor_outside_the_experts(mixtral, name):
    edit_tensors(mixtral / "model.safetensors", lambda t: t.pop(name))
    parameter = re.escape(name.replace("block_sparse_moe", "mlp"))
    with mistake(f"{mixtral}: no tensor of the checkpoint becomes '{parameter}'"):
        SourceCheckpoint(mixtral)


def test_tensor_of_another_shape_than_config_says(mixtral):
    edit_tensors(
        mixtral / "model.safetensors", lambda t: t.update({NORM: t[NORM][:19].contiguous()})
    )
    with mistake(rf"'{NORM}' has shape \[19\], config.json asks for \[20\]"):
        SourceCheckpoint(mixtral)


def test_index_may_list_a_tensor_that_the_model_ties(tied):
    weight_map = json.loads((tied / INDEX).read_text())["weight_map"]
    assert "lm_head.weight" not in weight_map
    write_index(tied, weight_map | {"lm_head.weight": FIRST})
    assert "lm_head.weight" not in SourceCheckpoint(tied).other_names


def test_index_lists_a_tensor_that_the_model_needs_and_no_shard_holds(shards):
    file = json.loads((shards / INDEX).read_text())["weight_map"]["lm_head.weight"]
    edit_tensors(shards / file, lambda t: t.pop("lm_head.weight"))
    with mistake("no tensor of the checkpoint becomes 'lm_head.weight'"):
        SourceCheckpoint(shards)


def test_tensor_that_the_index_omits_is_read_from_its_shard(shards, family_folder, tmp_path):
    expected = logits_of(dense_model(family_folder("mixtral")))
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    del weight_map[NORM]
    write_index(shards, weight_map)

    compress(shards, tmp_path / "c", keep=1.0)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")

    assert torch.allclose(logits_of(dense_model(tmp_path / "d")), expected, atol=1e-4)


def test_tensor_in_two_shards(shards):
    one, other = (load_file(shards / name) for name in SHARDS)
    name = min(one)
    save_file(other | {name: one[name]}, shards / SECOND, metadata=FORMAT)
    with mistake(f"tensor '{re.escape(name)}' is in {FIRST} and in {SECOND}"):
        SourceCheckpoint(shards)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantisation_of_a_part_of_the_config(mixtral, key):
    part = {"model_type": "mixtral", key: {"quant_method": "gptq", "bits": 4}}
    edit_json(mixtral / "config.json", lambda config: config.update(text_config=part))
    with mistake(f"{mixtral}: the model is quantised already, by 'gptq'"):
        SourceCheckpoint(mixtral)


def test_integers_where_the_model_has_floats(mixtral):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(mixtral / "model.safetensors", lambda t: t.update({name: t[name].to(torch.int8)}))
    with mistake(f"'{re.escape(name)}' is stored as I8: the model is quantised"):
        SourceCheckpoint(mixtral)


def _in_bfloat16(folder, **values):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()
        for name, value in values.items():
            tensors[name.replace("__", ".")].view(-1)[3] = value

    edit_tensors(folder / "model.safetensors", change)


EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.parametrize("name", [NORM, EXPERT, "lm_head.weight"])
@pytest.mark.parametrize("by_config", [False, True])
def test_value_beyond_the_dtype_that_the_model_is_loaded_in(mixtral, tmp_path, name, by_config):
    _in_bfloat16(mixtral, **{name: -1e5})
    dtype = "float16" if by_config else "bfloat16"
    edit_json(mixtral / "config.json", lambda config: config.update(dtype=dtype))
    with mistake(f"'{re.escape(name)}' holds values too large for torch.float16"):
        compress(mixtral, tmp_path / "c", **({} if by_config else {"dtype": "float16"}))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", [NORM, EXPERT])
def test_restore_refuses_values_beyond_its_dtype(mixtral, tmp_path, name):
    _in_bfloat16(mixtral, **{name: 1e5})
    edit_json(mixtral / "config.json", lambda config: config.update(dtype="bfloat16"))
    compress(mixtral, tmp_path / "c", keep=1.0)
    with mistake(f"'{re.escape(name)}' holds values too large for torch.float16"):
        restore_checkpoint(tmp_path / "c", tmp_path / "d", torch.float16)
    assert not (tmp_path / "d").exists()


def test_restore_refuses_a_folder_that_lacks_a_tensor(folder, tmp_path):
    index = folder / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_tensors(folder / weight_map["lm_head.weight"], lambda t: t.pop("lm_head.weight"))
    del weight_map["lm_head.weight"]
    write_index(folder, weight_map)
    with mistake("no tensor of the checkpoint becomes 'lm_head.weight'"):
        restore_checkpoint(folder, tmp_path / "d")
