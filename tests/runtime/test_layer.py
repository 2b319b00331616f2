"""The layer by itself: beside DeepSpeed's own MoE, in bfloat16, and with idle lanes."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from resmoe_dist import ResMoE, build_topology
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.restore import restored_expert
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.design_matrix import from_rows
from tests.checkpoints.regrouping import regroup
from tests.models import compress, relative_difference
from tests.ranks import run_on_ranks

HIDDEN, EXPERTS = 20, 4


class SwiGLU(nn.Module):
    """A dense expert, for DeepSpeed's layer."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        return F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])


def source_experts(folder: Path, layer: int = 0) -> list[dict[str, torch.Tensor]]:
    """Projections of each expert of a source model."""
    source = SourceCheckpoint(folder)
    shape = source.sites[layer].shape
    return [from_rows(shape, source.read_expert(layer, k)[0]) for k in range(EXPERTS)]


GATES = [
    {"k": 1, "use_rts": False, "drop_tokens": False},
    {"k": 1, "use_rts": False, "drop_tokens": True, "eval_capacity_factor": 1.0},
    {"k": 2, "top2_2nd_expert_sampling": False, "drop_tokens": False},
    {"k": 2, "top2_2nd_expert_sampling": False, "drop_tokens": True, "eval_capacity_factor": 0.5},
    {"k": 3, "drop_tokens": False},
]


def _beside_deepspeed(source: Path, compressed: Path, ep: int) -> list[tuple]:
    """(ours, DeepSpeed's) for each gate, each a tuple (output, l_aux, exp_counts)."""
    topology = build_topology(ep, 1)
    gate_weight = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(3 + topology.lane))
    dense = source_experts(source)
    pairs = []
    for options in GATES:
        ours = ResMoE.from_checkpoint(compressed, 0, topology, **options)
        theirs = MoE(HIDDEN, SwiGLU(dense[0]), EXPERTS, ep, **options)
        theirs.set_deepspeed_parallelism()
        owned = topology.owned_experts(EXPERTS)
        for module, k in zip(theirs.deepspeed_moe.experts.deepspeed_experts, owned, strict=True):
            module.load_state_dict(SwiGLU(dense[k]).state_dict())
        with torch.no_grad():
            outputs = []
            for layer in (ours, theirs):
                layer.deepspeed_moe.gate.wg.weight.copy_(gate_weight)
                outputs.append(layer.eval()(x))
        pairs.append(tuple(outputs))
    return pairs


@pytest.mark.parametrize("ep", [1, 2])
def test_with_its_own_gate_it_returns_what_deepspeeds_layer_does(family_folder, tmp_path, ep):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2, keep=1.0)

    for pairs in run_on_ranks(2, _beside_deepspeed, family_folder("mixtral"), tmp_path / "c", ep):
        for options, (ours, theirs) in zip(GATES, pairs, strict=True):
            assert relative_difference(ours[0], theirs[0]) <= 1e-4, options
            assert torch.allclose(ours[1], theirs[1]), options
            assert torch.equal(ours[2], theirs[2]), options


class _TwoLayers(nn.Module):
    def __init__(self, compressed: Path, ep: int, tp: int) -> None:
        super().__init__()
        topology = build_topology(ep, tp)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.moe = ResMoE.from_checkpoint(
            compressed, 1, topology, k=2, top2_2nd_expert_sampling=False, drop_tokens=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(self.first(x))[0]


def _inside_a_deepspeed_engine(compressed: Path, ep: int, tp: int) -> float:
    torch.manual_seed(0)
    model = _TwoLayers(compressed, ep, tp)
    x = torch.randn(3, HIDDEN)
    with torch.no_grad():
        alone = model(x)
        config = {"train_micro_batch_size_per_gpu": 1}
        engine, *_ = deepspeed.initialize(model=model, config=config, mpu=groups)
        engine.eval()
        return relative_difference(engine(x), alone)


def test_runs_inside_a_deepspeed_engine(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)

    assert max(run_on_ranks(4, _inside_a_deepspeed_engine, tmp_path / "c", 2, 2)) <= 1e-5


def _naive(folder: Path, x_TH, index_TK, weights_TK) -> torch.Tensor:
    """Token by token, expert by expert, in float64, from the stored tensors."""
    checkpoint = CompressedCheckpoint(folder)
    layer = checkpoint.index.layers[0]
    dense = {}
    for group in layer.groups:
        file = checkpoint.open_group(layer, group)
        dense |= {k: restored_expert(file, k, torch.float64)[0] for k in group.experts}
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t in range(len(x_TH)):
        for k, weight in zip(index_TK[t].tolist(), weights_TK[t].double(), strict=True):
            if k >= 0:
                w = from_rows(layer.shape, dense[k])
                x_H = x_TH[t].double()
                out_TH[t] += weight * (w["down"] @ (F.silu(w["gate"] @ x_H) * (w["up"] @ x_H)))
    return out_TH


def _routed(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(tokens, HIDDEN, generator=generator)
    scores_TE = torch.rand(tokens, EXPERTS, generator=generator)
    weights_TK, index_TK = scores_TE.softmax(-1).topk(2)
    return x_TH, index_TK, weights_TK


@pytest.mark.parametrize("codec", ["pruned", "low_rank", "quantized"])
def test_routed_output_is_the_naive_sum_over_experts(family_folder, tmp_path, codec):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2, codec=codec)
    x_TH, index_TK, weights_TK = _routed(11)
    index_TK[4, 1] = -1  # a copy that the router dropped

    found = ResMoE.from_checkpoint(tmp_path / "c", 0)(x_TH, index_TK, weights_TK)

    expected = _naive(tmp_path / "c", x_TH, index_TK, weights_TK)
    assert relative_difference(found.double(), expected) <= 1e-5


@pytest.mark.parametrize("centerless", [(), (1,)])
def test_bfloat16_output_is_within_the_rounding_of_its_steps(family_folder, tmp_path, centerless):
    # Each of C + R, gate, up, their product, and down is rounded to bf16 (relative 2⁻⁹ each, and
    # the products sum rounded terms); 2⁻⁶ of the largest output leaves a factor of about two.
    compress(family_folder("mixtral"), tmp_path / "c", groups=2, dtype="bfloat16")
    regroup(tmp_path / "c", tmp_path / "r", [[0, 1], [2, 3]], centerless=centerless, keep=0.5)
    x_TH, index_TK, weights_TK = _routed(64)
    x_TH = x_TH.bfloat16()

    found = ResMoE.from_checkpoint(tmp_path / "r", 0)(x_TH, index_TK, weights_TK)

    assert found.dtype == torch.bfloat16
    expected = _naive(tmp_path / "r", x_TH, index_TK, weights_TK)
    assert relative_difference(found.double(), expected) <= 2**-6


def _idle_lanes(folder: Path, tokens_of_lane: list[int], ep: int, tp: int) -> torch.Tensor:
    topology = build_topology(ep, tp)
    layer = ResMoE.from_checkpoint(folder, 0, topology)
    x_TH, index_TK, weights_TK = _routed(tokens_of_lane[topology.lane], seed=topology.lane)
    return layer(x_TH, index_TK, weights_TK)


@pytest.mark.parametrize("tokens", [[5, 0], [0, 3], [0, 0]])
def test_a_lane_may_have_no_tokens(family_folder, tmp_path, tokens):
    compress(family_folder("mixtral"), tmp_path / "c", groups=2)

    outputs = run_on_ranks(4, _idle_lanes, tmp_path / "c", tokens, 2, 2)

    for rank, found in enumerate(outputs):
        routed = _routed(tokens[rank // 2], seed=rank // 2)
        assert found.shape == routed[0].shape
        if len(found):
            expected = _naive(tmp_path / "c", *routed)
            assert relative_difference(found.double(), expected) <= 1e-5


def test_a_layer_without_a_gate_says_that_it_needs_routing(family_folder, tmp_path):
    compress(family_folder("mixtral"), tmp_path / "c")
    from resmoe_dist import load_model

    layer = load_model(tmp_path / "c").model.layers[0].mlp.experts

    with pytest.raises(ValueError, match="routing"):
        layer(torch.randn(3, HIDDEN))
