"""Layouts on disk other than transformers writes, and tensors that it does not load."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file

from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.launch.compress import compress as run_compress
from resmoe_dist.runtime.loading import load_model
from tests.all_families import tiny_model
from tests.checkpoints.damage import copy_of, edit_json, edit_tensors, mistake
from tests.families.test_all_families import outputs_of
from tests.models import compress, relative_difference


def _saved(family, folder):
    model = tiny_model(family)
    model.save_pretrained(folder)
    return outputs_of(model)


def _restored(folder, tmp_path):
    """The weights that compress at keep 1 and restore give back."""
    compress(folder, tmp_path / "c", keep=1.0, dtype="float32")
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    found = {}
    for path in (tmp_path / "d").glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_qwen3_vl_moe_as_released_stores_experts_transposed(tmp_path):
    expected = _saved("qwen3_vl_moe", tmp_path / "s")
    names = load_file(tmp_path / "s" / "model.safetensors").keys()
    experts = [name for name in names if ".experts." in name]
    assert experts

    def transpose(tensors):
        for name in experts:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    edit_tensors(tmp_path / "s" / "model.safetensors", transpose)

    compress(tmp_path / "s", tmp_path / "c", keep=1.0, dtype="float32")

    assert relative_difference(outputs_of(load_model(tmp_path / "c")), expected) < 1e-4


# Per-expert, fused, transposed, interleaved, stacked, tied, biased, and two modules in one block.
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "granitemoe",
        "inkling",
        "gpt_oss",
        "dbrx",
        "llama4",
        "nllb_moe",
        "diffusion_gemma",
        "ernie4_5_vl_moe",
        "nemotron_h",
    ],
)
def test_restore_gives_every_tensor_back(family, tmp_path):
    _saved(family, tmp_path / "s")
    source = load_file(tmp_path / "s" / "model.safetensors")

    found = _restored(tmp_path / "s", tmp_path)

    assert found.keys() == source.keys()
    others = SourceCheckpoint(tmp_path / "s").other_names
    for name, tensor in source.items():
        assert found[name].shape == tensor.shape
        if name in others:
            assert torch.equal(found[name], tensor)
        else:  # rows may be in another order
            assert torch.allclose(found[name].sum(), tensor.sum(), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("deepseek_v3", "model.layers.2"),
        ("qwen3_next", "mtp.layers.0"),
        ("mixtral", "mtp.layers.0"),
    ],
)
def test_experts_that_transformers_never_loads(family, prefix, tmp_path, caplog):
    expected = _saved(family, tmp_path / "s")
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    unused = f"{prefix}.{block}.experts.0.down_proj.weight"
    edit_tensors(
        tmp_path / "s" / "model.safetensors", lambda t: t.update({unused: torch.ones(4, 4)})
    )
    assert SourceCheckpoint(tmp_path / "s").unused_names == [unused]

    for drop, folder in ((False, "kept"), (True, "dropped")):
        config = CompressConfig(
            source=tmp_path / "s",
            output=tmp_path / folder,
            ep=1,
            keep=1.0,
            dtype="float32",
            drop_unused=drop,
        )
        with caplog.at_level(logging.WARNING):
            run_compress(config)
        (record,) = [r for r in caplog.records if "not used by transformers" in r.message]
        assert unused in record.message
        caplog.clear()
        stored = set()
        for path in (tmp_path / folder).glob("model*.safetensors"):
            stored |= load_file(path).keys()
        assert (unused in stored) is not drop
        assert relative_difference(outputs_of(load_model(tmp_path / folder)), expected) < 1e-4


def test_a_tied_module_that_is_stored_twice_is_compressed_twice(tmp_path):
    expected = _saved("diffusion_gemma", tmp_path / "s")

    def store_twice(tensors):
        for name, tensor in list(tensors.items()):
            if "decoder.layers" in name and ".experts." in name:
                other = name.replace("decoder.layers", "encoder.language_model.layers")
                tensors[other] = tensor.clone()

    edit_tensors(tmp_path / "s" / "model.safetensors", store_twice)
    assert len(SourceCheckpoint(tmp_path / "s").sites) == 4

    compress(tmp_path / "s", tmp_path / "c", keep=1.0, dtype="float32")

    assert relative_difference(outputs_of(load_model(tmp_path / "c")), expected) < 1e-4


def test_dense_config_of_a_family_with_experts(tmp_path):
    _saved("mixtral", tmp_path / "s")
    copy = copy_of(tmp_path / "s", tmp_path / "llama")
    edit_json(
        copy / "config.json",
        lambda config: config.update(model_type="llama", architectures=["LlamaForCausalLM"]),
    )
    with mistake("a 'llama' model has no experts to compress"):
        SourceCheckpoint(copy)
