"""Calibration samples are what a plain forward pass shows: inputs, routing and router logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.samples import LayerSamples, SampleFiles
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.workers import Workers
from tests.jobs.runs import before_each_task, contents
from tests.models import FAMILIES, dense_model, random_sequences, save_family

LENGTHS = (9, 4, 9, 12)
# Sequences of one length form one batch, in the order of their first sequence.
IN_BATCHES = (0, 2, 1, 3)
NO_EXPERT = -1
# Where the block around the experts holds its router's weight, and bias.
ROUTERS = {
    "mixtral": ("gate.weight", None),
    "qwen3_moe": ("gate.weight", None),
    "deepseek_v3": ("gate.weight", None),
    "gpt_oss": ("router.weight", "router.bias"),
    "switch": ("router.classifier.weight", None),
}


def _routing(family: str, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Index and weights [T, K] from the arguments of an experts module."""
    _, index, weights = arguments
    if family != "switch":
        return index, weights
    chosen = [row.nonzero().flatten().tolist() or [NO_EXPERT] for row in index[:, 0]]
    return torch.tensor(chosen), weights


@torch.no_grad()
def _plain_samples(
    folder: Path, family: str, sequences: list[list[int]]
) -> list[dict[str, Tensor]]:
    """The samples of each layer, by hooks on the whole model, one sequence at a time."""
    sites = SourceCheckpoint(folder).sites
    model = dense_model(folder)
    calls: dict[str, list[Any]] = {site.module: [] for site in sites}
    for site in sites:
        model.get_submodule(site.module).register_forward_pre_hook(
            lambda _, args, seen=calls[site.module]: seen.append([a.clone() for a in args])
        )
    for sequence in sequences:
        ids = torch.tensor([sequence])
        if model.config.is_encoder_decoder:
            half = len(sequence) // 2
            model(input_ids=ids[:, :half], labels=ids[:, half:])
        else:
            model(input_ids=ids)
    parameters = dict(model.named_parameters())
    weight, bias = ROUTERS[family]
    layers = []
    for site in sites:
        block = site.module.rpartition(".")[0]
        x_TH = torch.cat([arguments[0] for arguments in calls[site.module]])
        routing = [_routing(family, arguments) for arguments in calls[site.module]]
        logits_TE = x_TH @ parameters[f"{block}.{weight}"].T
        if bias is not None:
            logits_TE = logits_TE + parameters[f"{block}.{bias}"]
        layers.append(
            {
                "inputs_TH": x_TH,
                "index_TK": torch.cat([index for index, _ in routing]),
                "weights_TK": torch.cat([weights for _, weights in routing]),
                "logits_TE": logits_TE,
            }
        )
    return layers


def _measured(folder: Path, files: Path, sequences: list[list[int]]) -> list[LayerSamples]:
    source, samples = SourceCheckpoint(folder), SampleFiles(files)
    measure_activations(source, sequences, samples=samples)
    return [samples.read(layer) for layer in range(len(source.sites))]


def _assert_same(
    found: list[LayerSamples], family: str, folder: Path, sequences: list[list[int]]
) -> None:
    expected = _plain_samples(folder, family, [sequences[i] for i in IN_BATCHES])
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        # Experts may be listed in any order for a token.
        mine_TK, theirs_TK = mine.index_TK.sort(dim=1), theirs["index_TK"].sort(dim=1)
        assert torch.equal(mine_TK.values, theirs_TK.values)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(
            mine.weights_TK.gather(1, mine_TK.indices),
            theirs["weights_TK"].gather(1, theirs_TK.indices),
            **close,
        )
        torch.testing.assert_close(mine.inputs_TH, theirs["inputs_TH"], **close)
        assert mine.logits_TE is not None and mine.logits_TE.dtype == torch.float32
        torch.testing.assert_close(mine.logits_TE, theirs["logits_TE"], **close)


@pytest.mark.parametrize("family", ROUTERS)
def test_samples_equal_what_hooks_on_the_plain_model_see(family_folder, tmp_path, family):
    folder, sequences = family_folder(family), random_sequences(*LENGTHS)

    found = _measured(folder, tmp_path, sequences)

    _assert_same(found, family, folder, sequences)


def test_tokens_over_the_capacity_of_switch_have_no_expert(tmp_path):
    save_family(FAMILIES["switch"], tmp_path / "source", expert_capacity=1)
    (tmp_path / "files").mkdir()
    sequences = random_sequences(*LENGTHS)

    found = _measured(tmp_path / "source", tmp_path / "files", sequences)

    _assert_same(found, "switch", tmp_path / "source", sequences)
    assert all((layer.index_TK == NO_EXPERT).any() for layer in found)


def test_tokens_of_an_expert_come_with_their_weights(family_folder, tmp_path):
    layer = _measured(family_folder("mixtral"), tmp_path, random_sequences(9, 4))[0]

    for expert in range(4):
        x_RH, weight_R = layer.of_expert(expert)
        chosen = [
            (t, float(layer.weights_TK[t, k]))
            for t in range(len(layer.index_TK))
            for k in range(2)
            if layer.index_TK[t, k] == expert
        ]
        assert weight_R.tolist() == [weight for _, weight in chosen]
        assert torch.equal(x_RH, layer.inputs_TH[[t for t, _ in chosen]])


def test_resumed_run_reads_the_samples_of_the_interrupted_one(family_folder, tmp_path, monkeypatch):
    source = family_folder("mixtral")
    settings = CompressionSettings(
        method=MethodSpec(name="m_smoe"),
        residual_codec=CodecSpec.parse("pruned").with_keep(0.5),
        groups=1,
        layers=[0, 1],
        calibration="0" * 64,
    )
    measured = []

    def run(output: Path, *, resume: bool = False) -> None:
        checkpoint = SourceCheckpoint(source)

        def measure(samples: SampleFiles | None) -> Any:
            measured.append(output)
            return measure_activations(checkpoint, random_sequences(*LENGTHS), samples=samples)

        Compression(checkpoint, output, settings, measure=measure).run(resume=resume)

    def interrupt(_: Workers) -> None:
        raise KeyboardInterrupt

    run(tmp_path / "whole")
    with monkeypatch.context() as context:
        before_each_task(context, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")

    run(tmp_path / "resumed", resume=True)

    assert measured == [tmp_path / "whole", tmp_path / "resumed"]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
