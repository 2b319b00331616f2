"""Compressed folders of methods that merge or drop experts serve what the method computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.samples import SampleFiles
from resmoe_dist.design_matrix import from_rows
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.methods import EncodedGroup, SourceGroup, method_of
from tests.models import dense_model, logits_of, random_sequences, relative_difference

METHODS = [
    "averaging",
    "git_rebasin",
    "repair",
    "zipit",
    "m_smoe",
    "hc_smoe",
    "uncurl",
    "frequency_merging",
    "frequency_pruning",
]
SEQUENCES = random_sequences(30, 30, 12)
TOLERANCE = 1e-4  # relative, float32


def _compress(source: Path, output: Path, name: str) -> None:
    checkpoint = SourceCheckpoint(source)
    settings = CompressionSettings(
        method=MethodSpec(name=name),
        residual_codec=CodecSpec.parse("pruned").with_keep(0.5),
        groups=1,
        layers=list(range(len(checkpoint.sites))),
        calibration="0" * 64,
    )
    Compression(
        checkpoint,
        output,
        settings,
        measure=lambda samples: measure_activations(checkpoint, SEQUENCES, samples=samples),
    ).run()


def _computed(source: Path, files: Path, name: str) -> list[EncodedGroup]:
    """What the method encodes of each layer, from the source's experts in memory."""
    checkpoint, samples = SourceCheckpoint(source), SampleFiles(files)
    activations = measure_activations(checkpoint, SEQUENCES, samples=samples)
    method = method_of(MethodSpec(name=name))
    counts = [site.num_experts for site in checkpoint.sites]
    stored = method.experts_per_layer(counts, 0.5, activations)
    found = []
    for layer, site in enumerate(checkpoint.sites):
        experts = [checkpoint.read_expert(layer, k) for k in range(site.num_experts)]
        biases = [bias_H for _, bias_H in experts if bias_H is not None]
        group = SourceGroup(
            torch.stack([matrix_ID for matrix_ID, _ in experts]),
            site.shape,
            activations[layer],
            samples=samples.read(layer),
            activation=checkpoint.activation(layer),
            biases_EH=torch.stack(biases) if biases else None,
            max_stored=stored[layer],
        )
        wanted = GroupCodecs(CodecSpec.parse("pruned:keep=0.5"), torch.float32, budget=0.5)
        found.append(method.encode(group, method.codecs(wanted)))
    return found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch"])
@pytest.mark.parametrize("name", METHODS)
def test_folder_holds_what_the_method_computes_in_memory(family_folder, tmp_path, family, name):
    source = family_folder(family)
    expected = _computed(source, tmp_path, name)

    _compress(source, tmp_path / "c", name)

    checkpoint = CompressedCheckpoint(tmp_path / "c")
    assert list(checkpoint.faults()) == []
    assert sum(layer.stored_experts for layer in checkpoint.index.layers) == 2 * len(expected)
    for layer, encoded in zip(checkpoint.index.layers, expected, strict=True):
        assert layer.expert_map == encoded.expert_map
        (group,) = layer.groups
        file = checkpoint.open_group(layer, group)
        for number, residual in enumerate(encoded.residuals):
            matrix_ID, bias_H = restored_expert(file, number)
            assert torch.equal(matrix_ID, residual.decode())
            if encoded.biases is not None:
                assert bias_H is not None and torch.equal(bias_H, encoded.biases[number])


@torch.no_grad()
def _with_stored_experts(source: Path, folder: Path) -> torch.nn.Module:
    """The plain Mixtral with each expert replaced by the stored one; zeros for dropped ones."""
    model, checkpoint = dense_model(source), CompressedCheckpoint(folder)
    for layer, site in zip(checkpoint.index.layers, SourceCheckpoint(source).sites, strict=True):
        experts = model.get_submodule(layer.module)
        file = checkpoint.open_group(layer, layer.groups[0])
        assert layer.expert_map is not None
        for k, number in enumerate(layer.expert_map):
            matrix_ID = torch.zeros(site.shape.rows, site.shape.columns)
            if number >= 0:
                matrix_ID, _ = restored_expert(file, number)
            weights = from_rows(site.shape, matrix_ID)
            experts.gate_up_proj[k] = torch.cat([weights["gate"], weights["up"]])
            experts.down_proj[k] = weights["down"]
    return model


@pytest.mark.parametrize("name", [name for name in METHODS if name != "frequency_pruning"])
def test_merged_folder_serves_the_logits_of_the_plain_model_with_merged_experts(
    family_folder, tmp_path, name
):
    source = family_folder("mixtral")
    _compress(source, tmp_path / "c", name)

    found = logits_of(load_model(tmp_path / "c"))

    expected = logits_of(_with_stored_experts(source, tmp_path / "c"))
    assert relative_difference(found, expected) <= TOLERANCE
    assert relative_difference(found, logits_of(dense_model(source))) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["averaging", "hc_smoe"])
def test_recorded_errors_are_those_of_the_folder(family_folder, tmp_path, name):
    source = SourceCheckpoint(family_folder("mixtral"))
    _compress(source.folder, tmp_path / "c", name)

    checkpoint = CompressedCheckpoint(tmp_path / "c")
    for number, layer in enumerate(checkpoint.index.layers):
        (group,) = layer.groups
        file = checkpoint.open_group(layer, group)
        assert layer.expert_map is not None
        for k, stored in enumerate(layer.expert_map):
            # Neither method permutes rows, so the difference is the error.
            expert_ID, _ = source.read_expert(number, k)
            lost = float((expert_ID - restored_expert(file, stored)[0]).double().square().sum())
            assert group.squared_errors[k] == pytest.approx(lost, rel=1e-5, abs=1e-9)
