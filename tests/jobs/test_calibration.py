"""Measured activation statistics equal those of the plain model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import LayerActivations, save_activations
from resmoe_dist.jobs.calibration import measure_activations
from tests.checkpoints.damage import copy_of, edit_json, edit_tensors, mistake
from tests.models import FAMILIES, dense_model, random_sequences, save_family

LENGTHS = (9, 4, 9, 9, 12)


def _gated(experts, expert, x):
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return F.silu(gate) * up


def _gpt_oss(experts, expert, x):
    both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _switch(experts, expert, x):
    return F.relu(experts[f"expert_{expert}"].wi(x))


NEURONS = {"gpt_oss": _gpt_oss, "switch": _switch}


def _selected(family: str, routing: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return which token goes to which expert: booleans [T, E]."""
    if family == "switch":
        return routing[:, 0].bool()
    return F.one_hot(routing, num_experts).any(1)


@torch.no_grad()
def _plain_statistics(
    folder: Path, family: str, sequences: list[list[int]]
) -> list[LayerActivations]:
    """Compute the statistics with the whole model in memory, one sequence at a time."""
    sites = SourceCheckpoint(folder).sites
    model = dense_model(folder)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {site.module: [] for site in sites}
    modules = {site.module: model.get_submodule(site.module) for site in sites}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append((args[0].clone(), args[1].clone()))
        )
    for sequence in sequences:
        ids = torch.tensor([sequence])
        if model.config.is_encoder_decoder:
            half = len(sequence) // 2
            model(input_ids=ids[:, :half], labels=ids[:, half:])
        else:
            model(input_ids=ids)
    model.double()
    layers = []
    for site in sites:
        x_TH = torch.cat([x for x, _ in seen[site.module]]).double()
        routing = torch.cat([routing for _, routing in seen[site.module]])
        selected_TE = _selected(family, routing, site.num_experts)
        neurons = NEURONS.get(family, _gated)
        rms = [
            neurons(modules[site.module], k, x_TH[selected_TE[:, k]]).square().mean(0).sqrt()
            for k in range(site.num_experts)
        ]
        layers.append(
            LayerActivations(
                input_rms_H=x_TH.square().mean(0).sqrt(),
                neuron_rms_EI=torch.stack(rms),
                tokens_E=selected_TE.sum(0),
            )
        )
    return layers


def _assert_same(found: list[LayerActivations], expected: list[LayerActivations]) -> None:
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.input_rms_H.dtype == mine.neuron_rms_EI.dtype == torch.float32
        assert torch.equal(mine.tokens_E, theirs.tokens_E)
        used_E = mine.tokens_E > 0
        torch.testing.assert_close(
            mine.input_rms_H.double(), theirs.input_rms_H, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            mine.neuron_rms_EI[used_E].double(), theirs.neuron_rms_EI[used_E], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_those_of_the_plain_model(family_folder, family, fused):
    folder = family_folder(family, fused)
    sequences = random_sequences(*LENGTHS)

    found = measure_activations(SourceCheckpoint(folder), sequences)

    _assert_same(found, _plain_statistics(folder, family, sequences))


def test_tokens_over_the_capacity_of_switch_are_not_counted(tmp_path):
    save_family(FAMILIES["switch"], tmp_path, expert_capacity=1)
    sequences = random_sequences(*LENGTHS)

    found = measure_activations(SourceCheckpoint(tmp_path), sequences)

    _assert_same(found, _plain_statistics(tmp_path, "switch", sequences))
    assert all(int(layer.tokens_E.sum()) < sum(LENGTHS) // 2 for layer in found)


def test_model_runs_in_the_dtype_of_its_checkpoint(family_folder, tmp_path):
    dense_model(family_folder("mixtral")).bfloat16().save_pretrained(tmp_path)
    sequences = random_sequences(8, 8)

    found = measure_activations(SourceCheckpoint(tmp_path), sequences)[0]

    def input_error(expected: LayerActivations) -> float:
        return float((found.input_rms_H / expected.input_rms_H - 1).abs().max())

    # The first layer's input is attention output, computed in the checkpoint's dtype.
    assert input_error(_plain_statistics(tmp_path, "mixtral", sequences)[0]) < 1e-6
    assert input_error(_plain_statistics(family_folder("mixtral"), "mixtral", sequences)[0]) > 1e-4


def test_float8_model_runs_like_its_dequantised_copy(family_folder, tmp_path):
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    dense_model(family_folder("qwen3_moe")).bfloat16().save_pretrained(plain)
    copy_of(plain, quantized)

    def to_float8(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name]:
            scale = tensors[name].abs().max().float() / 448
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)

    def to_float8_and_back(tensors: dict[str, torch.Tensor]) -> None:
        to_float8(tensors)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            tensors[weight] = (tensors[weight].float() * tensors.pop(name)).bfloat16()

    edit_tensors(quantized / "model.safetensors", to_float8)
    edit_tensors(plain / "model.safetensors", to_float8_and_back)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(
        quantized / "config.json", lambda config: config.update(quantization_config=quantization)
    )

    found = measure_activations(SourceCheckpoint(quantized), random_sequences(*LENGTHS))

    expected = measure_activations(SourceCheckpoint(plain), random_sequences(*LENGTHS))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.input_rms_H, theirs.input_rms_H)
        assert torch.equal(mine.neuron_rms_EI, theirs.neuron_rms_EI)


def test_expert_without_tokens_gets_the_mean_of_the_others(family_folder, tmp_path):
    folder = copy_of(family_folder("gpt_oss"), tmp_path / "source")

    def never_choose_2(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.router.bias"][2] = -1e4

    edit_tensors(folder / "model.safetensors", never_choose_2)

    found = measure_activations(SourceCheckpoint(folder), random_sequences(30))[1]

    assert found.tokens_E[2] == 0 and found.tokens_E[[0, 1, 3]].min() > 0
    others_EI = found.neuron_rms_EI[[0, 1, 3]]
    torch.testing.assert_close(found.neuron_rms_EI[2], others_EI.mean(0))
    assert others_EI.std(0).min() > 0


def test_neurons_are_equal_if_no_expert_has_tokens(tmp_path):
    save_family(FAMILIES["switch"], tmp_path, expert_capacity=0)

    found = measure_activations(SourceCheckpoint(tmp_path), random_sequences(10))

    for layer in found:
        assert layer.tokens_E.sum() == 0
        assert torch.equal(layer.neuron_rms_EI, torch.ones_like(layer.neuron_rms_EI))
        assert layer.input_rms_H.max() > 0 and not (layer.input_rms_H == 1).all()


@pytest.mark.parametrize("wrong", ["absent", "short"])
def test_damaged_weight_is_refused(family_folder, tmp_path, wrong):
    folder = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.1.self_attn.q_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if wrong == "short":
            tensors[name] = tensor[:-1].clone()

    edit_tensors(folder / "model.safetensors", damage)

    with mistake(f"{name}' has shape" if wrong == "short" else f"becomes '{name}'"):
        measure_activations(SourceCheckpoint(folder), random_sequences(8))


def test_overflowing_activations_are_refused(family_folder, tmp_path):
    folder = copy_of(family_folder("mixtral"), tmp_path / "source")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for k in range(4):
            tensors[f"model.layers.1.block_sparse_moe.experts.{k}.w3.weight"].fill_(3e38)

    edit_tensors(folder / "model.safetensors", enlarge)

    with mistake("activations at model.layers.1.mlp.experts are NaN or infinite"):
        measure_activations(SourceCheckpoint(folder), random_sequences(8))


def test_same_sequences_give_the_same_bytes(family_folder, tmp_path):
    source = SourceCheckpoint(family_folder("qwen3_moe"))
    for name in ("a", "b"):
        layers = measure_activations(source, random_sequences(*LENGTHS))
        save_activations(tmp_path / name, source.sites, layers)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
