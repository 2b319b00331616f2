"""Activation statistics equal those of the plain model, measured with one expert in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import (
    LayerActivations,
    load_activations,
    save_activations,
)
from resmoe_dist.evaluation.perplexity import load_tokenizer
from resmoe_dist.jobs.calibration import calibration_sequences, measure_activations
from tests.checkpoints.damage import copy_of, edit_json, edit_tensors, mistake
from tests.models import FAMILIES, VOCABULARY, dense_model, save_family

LENGTHS = (9, 4, 9, 9, 12)


def _sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


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
    """Which token goes to which expert, as booleans [T, E]."""
    if family == "switch":
        return routing[:, 0].bool()
    return F.one_hot(routing, num_experts).any(1)


@torch.no_grad()
def _of_the_plain_model(
    folder: Path, family: str, sequences: list[list[int]]
) -> list[LayerActivations]:
    """The same statistics from the whole model in memory, one sequence at a time."""
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
def test_statistics_are_those_of_the_plain_model(family_folder, family, fused):
    folder = family_folder(family, fused)
    sequences = _sequences(*LENGTHS)

    found = measure_activations(SourceCheckpoint(folder), sequences)

    _assert_same(found, _of_the_plain_model(folder, family, sequences))


def test_tokens_that_switch_drops_over_capacity_count_for_no_expert(tmp_path):
    save_family(FAMILIES["switch"], tmp_path, expert_capacity=1)
    sequences = _sequences(*LENGTHS)

    found = measure_activations(SourceCheckpoint(tmp_path), sequences)

    _assert_same(found, _of_the_plain_model(tmp_path, "switch", sequences))
    assert all(int(layer.tokens_E.sum()) < sum(LENGTHS) // 2 for layer in found)


def test_the_model_runs_in_the_dtype_of_its_checkpoint(family_folder, tmp_path):
    dense_model(family_folder("mixtral")).bfloat16().save_pretrained(tmp_path)
    sequences = _sequences(8, 8)

    found = measure_activations(SourceCheckpoint(tmp_path), sequences)[0]

    def input_error(expected: LayerActivations) -> float:
        return float((found.input_rms_H / expected.input_rms_H - 1).abs().max())

    # The first layer's input comes from attention, run as transformers runs it.
    assert input_error(_of_the_plain_model(tmp_path, "mixtral", sequences)[0]) < 1e-6
    assert (
        input_error(_of_the_plain_model(family_folder("mixtral"), "mixtral", sequences)[0]) > 1e-4
    )


def test_a_float8_model_runs_as_its_dequantised_copy(family_folder, tmp_path):
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    dense_model(family_folder("qwen3_moe")).bfloat16().save_pretrained(plain)
    copy_of(plain, quantized)

    def to_float8(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name]:
            scale = tensors[name].abs().max().float() / 448
            tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)

    def back(tensors: dict[str, torch.Tensor]) -> None:
        to_float8(tensors)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            tensors[weight] = (tensors[weight].float() * tensors.pop(name)).bfloat16()

    edit_tensors(quantized / "model.safetensors", to_float8)
    edit_tensors(plain / "model.safetensors", back)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(
        quantized / "config.json", lambda config: config.update(quantization_config=quantization)
    )

    found = measure_activations(SourceCheckpoint(quantized), _sequences(*LENGTHS))

    expected = measure_activations(SourceCheckpoint(plain), _sequences(*LENGTHS))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.input_rms_H, theirs.input_rms_H)
        assert torch.equal(mine.neuron_rms_EI, theirs.neuron_rms_EI)


def test_an_expert_without_tokens_gets_the_mean_of_the_others(family_folder, tmp_path):
    folder = copy_of(family_folder("gpt_oss"), tmp_path / "source")

    def never_choose_2(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.router.bias"][2] = -1e4

    edit_tensors(folder / "model.safetensors", never_choose_2)

    found = measure_activations(SourceCheckpoint(folder), _sequences(30))[1]

    assert found.tokens_E[2] == 0 and found.tokens_E[[0, 1, 3]].min() > 0
    others_EI = found.neuron_rms_EI[[0, 1, 3]]
    torch.testing.assert_close(found.neuron_rms_EI[2], others_EI.mean(0))
    assert others_EI.std(0).min() > 0


def test_where_no_expert_has_tokens_neurons_count_as_equal(tmp_path):
    save_family(FAMILIES["switch"], tmp_path, expert_capacity=0)

    found = measure_activations(SourceCheckpoint(tmp_path), _sequences(10))

    for layer in found:
        assert layer.tokens_E.sum() == 0
        assert torch.equal(layer.neuron_rms_EI, torch.ones_like(layer.neuron_rms_EI))
        assert layer.input_rms_H.max() > 0 and not (layer.input_rms_H == 1).all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch"])
def test_never_more_than_one_expert_is_in_memory(family_folder, monkeypatch, family):
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
    found = measure_activations(source, _sequences(16, 16, 16, 16))

    # All sequences go through together, so an expert that has any tokens is read once.
    used = [(i, k) for i, layer in enumerate(found) for k in range(4) if layer.tokens_E[k]]
    assert sorted(reads) == used and len(used) > 4
    assert all(storage.expired() for storage in alive)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_weights_that_are_no_experts_stay_mapped_from_the_file(family_folder):
    folder = family_folder("mixtral")
    mapped: dict[str, bool] = {}

    def look(module, _args):
        mappings = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(folder / "model.safetensors"))
        ]
        for name, parameter in module.named_parameters():
            address = parameter.data_ptr()
            mapped[name] = any(begin <= address < end for begin, end in mappings)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        measure_activations(SourceCheckpoint(folder), _sequences(8))
    finally:
        hook.remove()

    assert mapped["embed_tokens.weight"] and all(mapped.values())
    assert not any("experts" in name for name in mapped)


def test_the_same_sequences_give_the_same_bytes(family_folder, tmp_path):
    source = SourceCheckpoint(family_folder("qwen3_moe"))
    for name in ("a", "b"):
        layers = measure_activations(source, _sequences(*LENGTHS))
        save_activations(tmp_path / name, source.sites, layers)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_statistics_come_back_from_their_file(family_folder, tmp_path):
    source = SourceCheckpoint(family_folder("switch"))
    layers = measure_activations(source, _sequences(*LENGTHS))

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
    layers = measure_activations(source, _sequences(8))
    save_activations(tmp_path / "activations.safetensors", source.sites, layers)

    with mistake(message):
        load_activations(
            tmp_path / "activations.safetensors", SourceCheckpoint(family_folder(other)).sites
        )


@pytest.mark.parametrize("wrong", ["absent", "short"])
def test_a_damaged_weight_is_refused_not_filled_with_noise(family_folder, tmp_path, wrong):
    folder = copy_of(family_folder("mixtral"), tmp_path / "source")
    name = "model.layers.1.self_attn.q_proj.weight"

    def harm(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if wrong == "short":
            tensors[name] = tensor[:-1].clone()

    edit_tensors(folder / "model.safetensors", harm)

    with mistake(f"{name}' is missing or its shape differs from config.json"):
        measure_activations(SourceCheckpoint(folder), _sequences(8))


def test_activations_that_overflow_are_refused(family_folder, tmp_path):
    folder = copy_of(family_folder("mixtral"), tmp_path / "source")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for k in range(4):
            tensors[f"model.layers.1.block_sparse_moe.experts.{k}.w3.weight"].fill_(3e38)

    edit_tensors(folder / "model.safetensors", enlarge)

    with mistake("activations at model.layers.1.mlp.experts are NaN or infinite"):
        measure_activations(SourceCheckpoint(folder), _sequences(8))


@pytest.fixture
def text(embedded_source, tmp_path):
    """A text file, the embedded model's tokenizer and the text's token ids."""
    path, tokenizer = tmp_path / "text", load_tokenizer(embedded_source)
    path.write_text("def value(self):\n    return self.value\n" * 50, encoding="utf-8")
    return path, tokenizer, tokenizer(path.read_text(encoding="utf-8"))["input_ids"]


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [(64, 16, [16] * 4), (70, 16, [16] * 4), (10, 16, [10])],
)
def test_calibration_text_is_cut_to_whole_windows(text, tokens, context, expected):
    path, tokenizer, ids = text

    windows = calibration_sequences(path, tokenizer, tokens=tokens, context=context)

    assert [len(window) for window in windows] == expected
    assert [token for window in windows for token in window] == ids[: sum(expected)]


def test_a_rest_of_the_text_that_fills_no_window_is_left_out(text):
    path, tokenizer, ids = text
    context = len(ids) // 2 - 1

    assert calibration_sequences(path, tokenizer, context=context) == [
        ids[:context],
        ids[context : 2 * context],
    ]


def test_a_text_shorter_than_a_window_is_used_whole(text):
    path, tokenizer, ids = text

    assert calibration_sequences(path, tokenizer, context=len(ids) + 1) == [ids]


def test_every_token_of_the_embedded_model_reaches_all_its_experts(embedded_source, text):
    source = SourceCheckpoint(embedded_source)
    path, tokenizer, _ = text

    found = measure_activations(source, calibration_sequences(path, tokenizer, 256, 64))

    assert len(found) == len(source.sites)
    routed = 4 * 64 * source.config.num_experts_per_tok
    assert all(int(layer.tokens_E.sum()) == routed for layer in found)
