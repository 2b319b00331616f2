"""Sensitivity of layers, against plain transformers with noise in one layer.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs.sensitivity import NOISE, measure_sensitivity
from tests.all_families import tiny_model
from tests.models import FAMILIES, dense_model, random_sequences, save_family

pytestmark = pytest.mark.usefixtures("one_thread")

# Three sequences are read of each layer if there are four layers.
SEQUENCES = random_sequences(*[24] * 3)
DRAWS = 6
LAYERS = {
    "mixtral": {"num_hidden_layers": 4},
    "deepseek_v3": {"num_hidden_layers": 4},
    "qwen3_moe": {"num_hidden_layers": 4},
    "gpt_oss": {"num_hidden_layers": 4},
    "switch": {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2},
}


def _save(family: str, folder: Path, **sizes: int) -> SourceCheckpoint:
    save_family(FAMILIES[family], folder, **LAYERS[family] | sizes)
    return SourceCheckpoint(folder)


def _predictions(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """log p [B, S, V]"""
    if not model.config.is_encoder_decoder:
        return model(ids_BS).logits.log_softmax(-1)
    half = ids_BS.shape[1] // 2
    return model(
        input_ids=ids_BS[:, :half], labels=ids_BS[:, half:].contiguous()
    ).logits.log_softmax(-1)


@torch.no_grad()
def _by_hand(source: SourceCheckpoint, sequences: list[list[int]]) -> list[float]:
    """The mean divergence over several draws of noise, for each layer."""
    model, ids_BS = dense_model(source.folder), torch.tensor(sequences)
    own_BSV = _predictions(model, ids_BS)
    found = []
    for site in source.sites:
        weights = [p for n, p in model.named_parameters() if n.startswith(f"{site.module}.")]
        total = 0.0
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(1000 + draw)
            kept = [weight.clone() for weight in weights]
            for weight in weights:
                _add_noise(weight, generator, source)
            changed_BSV = _predictions(model, ids_BS)
            divergence_BS = (own_BSV.exp() * (own_BSV - changed_BSV)).sum(-1)
            total += float(divergence_BS.mean()) / NOISE
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
        found.append(total / DRAWS)
    return found


def _add_noise(weight: Tensor, generator: torch.Generator, source: SourceCheckpoint) -> None:
    """Noise of NOISE times the energy of each matrix; none in biases."""
    experts = source.sites[0].num_experts
    matrices = weight if len(weight) == experts and weight.dim() == 3 else weight.unsqueeze(0)
    if weight.dim() < 2 or (weight.dim() == 2 and len(weight) == experts):
        return  # biases
    for matrix in matrices:
        noise = torch.randn(matrix.shape, generator=generator)
        matrix += noise * (NOISE * matrix.square().mean()).sqrt()


@pytest.mark.parametrize("family", LAYERS)
def test_it_is_the_divergence_that_noise_in_one_layer_causes(family, tmp_path):
    source = _save(family, tmp_path / "source")
    layers = range(len(source.sites))
    copies = len(source.sites) + 1

    found = measure_sensitivity(source, SEQUENCES, layers)

    assert found is not None
    expected = _by_hand(source, SEQUENCES[: 16 // copies])
    # Draws of noise differ by about a quarter on models this small.
    assert found == pytest.approx(expected, rel=0.5)


@torch.no_grad()
def test_it_is_exact_for_the_same_noise(tmp_path):
    source = _save("mixtral", tmp_path / "source")
    ids_BS = torch.tensor(SEQUENCES)
    own_BSV = _predictions(dense_model(source.folder), ids_BS)
    expected = []
    for layer, site in enumerate(source.sites):
        model = dense_model(source.folder)
        experts = model.get_submodule(site.module)
        for k in range(site.num_experts):
            generator = torch.Generator().manual_seed(layer << 20 | k)
            rows = site.shape.rows
            gate, up = experts.gate_up_proj[k][:rows], experts.gate_up_proj[k][rows:]
            for weight in (gate, up, experts.down_proj[k]):
                noise = torch.randn(weight.shape, generator=generator)
                weight += noise * (NOISE * weight.square().mean()).sqrt()
        changed_BSV = _predictions(model, ids_BS)
        divergence_BS = (own_BSV.exp() * (own_BSV - changed_BSV)).sum(-1)
        expected.append(float(divergence_BS.mean()) / NOISE)

    found = measure_sensitivity(source, SEQUENCES, range(len(source.sites)))

    assert found == pytest.approx(expected, rel=1e-3)


def test_layers_of_several_passes_are_those_of_one(tmp_path):
    source = _save("mixtral", tmp_path / "source", num_hidden_layers=9)
    # With one sequence, all copies of all passes read the same.
    found = measure_sensitivity(source, SEQUENCES[:1], range(9))

    assert found is not None
    for layers in ([0, 1], [3, 7, 8]):
        again = measure_sensitivity(source, SEQUENCES[:1], layers)
        assert again == pytest.approx([found[layer] for layer in layers], rel=1e-3)


def test_a_layer_that_changes_nothing_counts_a_little(tmp_path):
    source = _save("mixtral", tmp_path / "source")
    model = dense_model(source.folder)
    for name, weight in model.named_parameters():
        if name.startswith("model.layers.1.mlp.experts."):
            weight.data.zero_()
    model.save_pretrained(tmp_path / "zero")

    found = measure_sensitivity(SourceCheckpoint(tmp_path / "zero"), SEQUENCES, range(4))

    assert found is not None
    others = found[0] + found[2] + found[3]
    assert found[1] == pytest.approx(others / 4 * 0.01, rel=1e-6)


def test_it_is_unknown_if_the_head_is_not_seen(tmp_path):
    tiny_model("diffusion_gemma").save_pretrained(tmp_path)
    source = SourceCheckpoint(tmp_path)

    assert measure_sensitivity(source, SEQUENCES, range(len(source.sites))) is None
