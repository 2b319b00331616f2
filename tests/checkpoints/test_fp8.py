"""Float8 sources: read as the bfloat16 model that their blocks and scales stand for."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resmoe_dist.checkpoints.fp8 import ScaleBlocks
from resmoe_dist.checkpoints.source import SourceCheckpoint
from tests.checkpoints.damage import FORMAT, copy_of, edit_json, edit_tensors, mistake, names_in
from tests.checkpoints.resident import MIB, at_most_resident
from tests.models import compress

# Neither divides the sizes of the tiny models.
ROWS, COLUMNS = 6, 8
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
OTHER = "model.layers.0.self_attn.o_proj.weight"
LAYOUTS = [("deepseek_v3", False), ("qwen3_moe", False), ("mixtral", False), ("mixtral", True)]


def _is_converted(name: str, tensor: Tensor) -> bool:
    """Routers, norms, embeddings and the output head stay as they are, as in DeepSeek-V3."""
    kept = ("gate.weight", "norm", "embed", "lm_head", "bias")
    return tensor.dim() > 1 and not any(part in name for part in kept)


def _blocks(shape: torch.Size) -> list[tuple[slice, slice]]:
    return [
        (slice(i, i + ROWS), slice(j, j + COLUMNS))
        for i in range(0, shape[-2], ROWS)
        for j in range(0, shape[-1], COLUMNS)
    ]


def _quantised(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight [.., O, C] in float8, and its scales, one block after the other."""
    grid = (*weight.shape[:-2], -(-weight.shape[-2] // ROWS), -(-weight.shape[-1] // COLUMNS))
    float8 = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(grid, dtype=scale_dtype)
    for i, j in _blocks(weight.shape):
        block = weight[..., i, j]
        at = (..., i.start // ROWS, j.start // COLUMNS)
        scale[at] = (block.abs().amax((-2, -1)) / 448).to(scale_dtype)
        float8[..., i, j] = (block / scale[at].float()[..., None, None]).to(torch.float8_e4m3fn)
    return float8, scale


def _meant(float8: Tensor, scale: Tensor) -> Tensor:
    meant = float8.float()
    for i, j in _blocks(float8.shape):
        meant[..., i, j] *= scale[..., i.start // ROWS, j.start // COLUMNS][..., None, None].float()
    return meant.bfloat16()


@pytest.fixture
def make(family_folder, tmp_path):
    """make(family, fused): a folder in float8, and one in bfloat16 of the same values."""

    def make(family, fused=False, scale_dtype=torch.float32):
        folders = (
            copy_of(family_folder(family, fused), tmp_path / "fp8"),
            copy_of(family_folder(family, fused), tmp_path / "bf16"),
        )
        stored, meant = {}, {}
        for name, tensor in load_file(folders[0] / "model.safetensors").items():
            if not _is_converted(name, tensor):
                stored[name] = meant[name] = tensor
                continue
            stored[name], scale = _quantised(tensor, scale_dtype)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = _meant(stored[name], scale)
        for folder, tensors in zip(folders, (stored, meant), strict=True):
            save_file(tensors, folder / "model.safetensors", metadata=FORMAT)
        quantisation = {
            "quant_method": "fp8",
            "weight_block_size": [ROWS, COLUMNS],
            "activation_scheme": "dynamic",
        }
        edit_json(folders[0] / "config.json", lambda c: c.update(quantization_config=quantisation))
        return folders

    return make


@pytest.fixture
def deepseek(make):
    return make("deepseek_v3")[0]


# The pieces in which a tensor is read end within its blocks.
@pytest.mark.parametrize("entries", [1, 70, 1 << 22])
@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
def test_experts_and_others_are_those_of_the_bfloat16_model(make, family, fused, entries):
    float8, bfloat16 = make(family, fused)
    found = SourceCheckpoint(float8, block_entries=entries)
    expected = SourceCheckpoint(bfloat16)

    for layer, site in enumerate(expected.sites):
        assert found.dtype(layer) == torch.bfloat16
        for expert in range(site.num_experts):
            matrix, bias = found.read_expert(layer, expert)
            assert matrix.dtype == torch.bfloat16
            assert torch.equal(matrix, expected.read_expert(layer, expert)[0])
            assert bias is None
    assert sorted(found.other_names) == sorted(expected.other_names)
    for name in expected.other_names:
        tensor = found.read_other(name)
        assert tensor.dtype == expected.read_other(name).dtype
        assert torch.equal(tensor, expected.read_other(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_in_other_types(make, dtype):
    found, expected = map(SourceCheckpoint, make("qwen3_moe", scale_dtype=dtype))

    assert torch.equal(found.read_expert(1, 2)[0], expected.read_expert(1, 2)[0])


def test_other_tensors_of_several_experts(deepseek):
    name = "model.layers.9.fused.weight"  # of a layer that the model does not have
    float8, scale = _quantised(torch.randn(3, 7, 9), torch.float32)
    tensors = {name: float8, f"{name}_scale_inv": scale}
    edit_tensors(deepseek / "model.safetensors", lambda t: t.update(tensors))

    found = SourceCheckpoint(deepseek).read_other(name)

    assert torch.equal(found, _meant(float8, scale))


def test_weights_and_scales_in_different_files(deepseek):
    whole = SourceCheckpoint(deepseek).read_expert(0, 2)[0]
    tensors = load_file(deepseek / "model.safetensors")
    (deepseek / "model.safetensors").unlink()
    weight_map = {name: f"{name.endswith('_inv')}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, deepseek / file, metadata=FORMAT)
    index = deepseek / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    assert torch.equal(SourceCheckpoint(deepseek).read_expert(0, 2)[0], whole)


@pytest.mark.parametrize("codec", ["pruned", "low_rank", "quantized"])
def test_it_is_compressed_to_the_bytes_that_the_bfloat16_model_is(make, tmp_path, codec):
    float8, bfloat16 = make("deepseek_v3")

    for source, name in ((float8, "a"), (bfloat16, "b")):
        compress(source, tmp_path / name, groups=2, codec=codec)

    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for name in names_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_model_of_which_nothing_was_converted(family_folder, tmp_path):
    plain = family_folder("qwen3_moe")
    folder = copy_of(plain, tmp_path / "source")
    quantisation = {"quantization_config": {"quant_method": "fp8"}}
    edit_json(folder / "config.json", lambda config: config.update(quantisation))

    found, expected = SourceCheckpoint(folder), SourceCheckpoint(plain)

    assert found.dtype(0) == torch.float32
    assert torch.equal(found.read_expert(0, 1)[0], expected.read_expert(0, 1)[0])


def test_blocks_are_of_128_where_the_config_does_not_say(deepseek):
    edit_json(deepseek / "config.json", lambda c: c["quantization_config"].pop("weight_block_size"))
    with mistake(r"_scale_inv' has shape \[.*, blocks of 128 x 128 ask for \[1, 1\]"):
        SourceCheckpoint(deepseek)


@pytest.mark.parametrize("method", ["gptq", "mxfp4", "fbgemm_fp8", "bitsandbytes", None])
def test_other_quantisations_are_named(deepseek, method):
    edit_json(
        deepseek / "config.json", lambda c: c["quantization_config"].update(quant_method=method)
    )
    with mistake(f"{deepseek}: the model is quantised already, by {method!r}; give the unquan"):
        SourceCheckpoint(deepseek)


@pytest.mark.parametrize("size", [None, [], [128], [0, 128], [128, -1], [1, 2, 3], "no", 128])
def test_invalid_block_sizes(deepseek, size):
    edit_json(
        deepseek / "config.json", lambda c: c["quantization_config"].update(weight_block_size=size)
    )
    with mistake(f"{deepseek}: .* by 'fp8' with weight_block_size {re.escape(repr(size))}; give"):
        SourceCheckpoint(deepseek)


@pytest.mark.parametrize("name", [WEIGHT, OTHER])
def test_missing_scales(deepseek, name):
    edit_tensors(deepseek / "model.safetensors", lambda t: t.pop(f"{name}_scale_inv"))
    with mistake(
        f"{deepseek}/model.safetensors: tensor '{re.escape(name)}' is stored as F8_E4M3, but "
        f"'{re.escape(name)}_scale_inv' is missing"
    ):
        SourceCheckpoint(deepseek)


@pytest.mark.parametrize("name", [WEIGHT, OTHER])
def test_scales_of_another_shape(deepseek, name):
    edit_tensors(
        deepseek / "model.safetensors",
        lambda t: t.update({f"{name}_scale_inv": t[f"{name}_scale_inv"][:, 1:].contiguous()}),
    )
    with mistake(f"'{re.escape(name)}_scale_inv' has shape .*, blocks of 6 x 8 ask for"):
        SourceCheckpoint(deepseek)


def test_scales_of_an_unsupported_dtype(deepseek):
    name = f"{WEIGHT}_scale_inv"
    edit_tensors(deepseek / "model.safetensors", lambda t: t.update({name: t[name].int()}))
    with mistake(f"'{re.escape(name)}' is stored as I32; supported are F32, F16, BF16, F8_E8M0"):
        SourceCheckpoint(deepseek)


def test_scales_without_a_weight_in_float8(deepseek):
    edit_tensors(deepseek / "model.safetensors", lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}))
    with mistake(f"tensor '{re.escape(WEIGHT)}_scale_inv' scales no tensor in F8_E4M3"):
        SourceCheckpoint(deepseek)


def test_a_vector_in_float8(deepseek):
    name = "model.norm.weight"
    edit_tensors(
        deepseek / "model.safetensors", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)})
    )
    with mistake(rf"'{name}' of shape \[20\] is stored as F8_E4M3, which is supported for matr"):
        SourceCheckpoint(deepseek)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WEIGHT, OTHER])
def test_non_finite_scale(deepseek, name, value):
    edit_tensors(
        deepseek / "model.safetensors", lambda t: t[f"{name}_scale_inv"][-1, -1].fill_(value)
    )
    source = SourceCheckpoint(deepseek)

    with mistake(f"{deepseek}/model.safetensors: tensor '{re.escape(name)}_scale_inv' holds NaN"):
        source.read_other(name) if name == OTHER else source.read_expert(0, 2)


@pytest.mark.parametrize("name", [WEIGHT, OTHER])
def test_non_finite_value(deepseek, name):
    edit_tensors(
        deepseek / "model.safetensors", lambda t: t[name].view(torch.uint8)[5, 3].fill_(0x7F)
    )
    source = SourceCheckpoint(deepseek)

    with mistake(f"{deepseek}/model.safetensors: tensor '{re.escape(name)}' holds NaN"):
        source.read_other(name) if name == OTHER else source.read_expert(0, 2)


def test_dequantising_takes_little_memory_besides():
    blocks = ScaleBlocks(rows=128, columns=128)
    weight = torch.ones(2048, 7168).to(torch.float8_e4m3fn)
    scale = torch.full(blocks.grid(weight.shape), 2.0)
    blocks.dequantize(weight, scale, 0)  # the allocator's own reserve grows once

    with at_most_resident(28 * MIB + 24 * MIB):  # the result, and less than float32 takes
        assert blocks.dequantize(weight, scale, 0).aminmax() == (2, 2)


def test_a_product_is_rounded_once():
    # In bfloat16 the scale alone would be rounded down to 1.
    weight, scale = torch.tensor([[1.75]]), torch.tensor([[1 + 2**-8]])

    found = ScaleBlocks(rows=1, columns=1).dequantize(weight.to(torch.float8_e4m3fn), scale, 0)

    assert found.item() == (weight * scale).bfloat16().item()
    assert found.item() != (weight.bfloat16() * scale.bfloat16()).item()
