"""Method `reap`: which experts stay, and what the checkpoint then is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resmoe_dist import load_model
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import DROPPED
from resmoe_dist.checkpoints.format import CompressionSettings, MethodSpec
from resmoe_dist.checkpoints.restore import restore_checkpoint
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.report import describe
from resmoe_dist.jobs.calibration import measure_activations
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.methods import SourceGroup, method_of
from resmoe_dist.methods.reap import saliency
from tests.models import dense_model, logits_of, random_sequences, relative_difference

KEEP = 0.5


def _settings(**changes) -> CompressionSettings:
    values = {
        "groups": 1,
        "method": MethodSpec(name="reap"),
        "residual_codec": CodecSpec.parse(f"pruned:keep={KEEP}"),
        "layers": [0, 1],
        "calibration": "0" * 64,
    }
    return CompressionSettings(**(values | changes))


def test_saliency_is_the_mean_weighted_norm_of_outputs():
    # Two-layer experts of one neuron and two hidden dimensions: f(x) = relu(in·x)·out.
    experts = torch.tensor([[[1.0, 0.0, 3.0, 4.0]], [[0.0, 1.0, 1.0, 0.0]], [[1.0, 1.0, 9.0, 9.0]]])
    samples = LayerSamples(
        inputs_TH=torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        index_TK=torch.tensor([[0, 1], [1, 0]]),
        weights_TK=torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
    )
    shape = ExpertShape(rows=1, hidden=2, gated=False)
    group = SourceGroup(experts, shape, samples=samples, activation=F.relu, max_stored=1)

    # Expert 0: ‖(3, 4)‖ = 5 per unit of input 1; tokens 1 and 2. Expert 2 has no tokens.
    assert saliency(group).tolist() == [(0.75 * 5 + 0.5 * 10) / 2, (0.25 * 2 + 0.5 * 1) / 2, 0]
    method = method_of(MethodSpec(name="reap"))
    codecs = method.codecs(GroupCodecs(CodecSpec.parse("pruned"), torch.float32))
    found = method.encode(group, codecs)
    assert found.expert_map == [0, DROPPED, DROPPED]
    assert torch.equal(found.residuals[0].decode(), experts[0])
    assert [loss.squared_error for loss in found.losses] == pytest.approx([0, 2, 164])


def test_checkpoint_keeps_the_salient_experts_and_serves_the_smaller_model(family_folder, tmp_path):
    source = SourceCheckpoint(family_folder("mixtral"))
    sequences = random_sequences(16, 16, 9)

    index = Compression(
        source,
        tmp_path / "c",
        _settings(),
        measure=lambda samples: measure_activations(source, sequences, samples=samples),
    ).run()

    for layer, expected in zip(index.layers, _saliency_by_hooks(source, sequences), strict=True):
        kept = sorted(expected.topk(2).indices.tolist())
        assert layer.kept_experts == kept
        assert layer.num_experts == 4
    errors = describe(CompressedCheckpoint(tmp_path / "c"))["layers"][0]
    norms = [source.read_expert(0, k)[0].square().sum().item() for k in range(4)]
    lost = sum(norms[k] for k in range(4) if k not in index.layers[0].kept_experts)
    assert errors["relative_error"] == pytest.approx(lost / sum(norms))
    assert errors["ratio"] == pytest.approx(KEEP)
    restore_checkpoint(tmp_path / "c", tmp_path / "d")
    assert dense_model(tmp_path / "d").config.num_local_experts == 2
    expected = logits_of(dense_model(tmp_path / "d"))
    assert relative_difference(logits_of(load_model(tmp_path / "c")), expected) <= 1e-4


def _saliency_by_hooks(source: SourceCheckpoint, sequences: list[list[int]]) -> list[torch.Tensor]:
    """By plain transformers: what each experts module receives, and outputs by its own weights."""
    model = dense_model(source.folder)
    seen: list[list[tuple[torch.Tensor, ...]]] = []
    for site in source.sites:
        calls: list[tuple[torch.Tensor, ...]] = []
        seen.append(calls)
        module = model.get_submodule(site.module)
        module.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    found = []
    for site, calls in zip(source.sites, seen, strict=True):
        module = model.get_submodule(site.module)
        x_TH, index_TK, weights_TK = (torch.cat(parts) for parts in zip(*calls, strict=True))
        scores = torch.zeros(site.num_experts)
        for k in range(site.num_experts):
            token_R, slot_R = torch.where(index_TK == k)
            gate, up = (x_TH[token_R] @ module.gate_up_proj[k].T).chunk(2, -1)
            out = (F.silu(gate) * up) @ module.down_proj[k].T
            scores[k] = (weights_TK[token_R, slot_R] * out.norm(dim=1)).mean()
        found.append(scores.detach())
    return found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"calibration": None}, "--method reap: needs --calibration TEXT"),
        ({"groups": 2}, "--method reap: chooses among all experts of a layer; give --ep 1"),
    ],
)
def test_what_reap_needs_is_asked_for(family_folder, tmp_path, changes, reason):
    source = SourceCheckpoint(family_folder("mixtral"))

    with pytest.raises(UserError, match=reason):
        Compression(source, tmp_path / "c", _settings(**changes))
