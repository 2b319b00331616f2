"""One MoE layer as each library runs it on the same ranks, with the same weights and routing.

A *system* is a layer with its router: a function of the tokens that this rank carries. Systems
divide a step's tokens differently: over lanes, over all ranks, or not at all.

    ours            a form of dispatch and a number of lanes, on the grid of the launch
    DeepSpeed       `deepspeed.moe.layer.MoE` with one expert-parallel position per rank; AutoEP
    transformers    its `EPImplementation`s over its experts module, in each implementation

All route alike: softmax in float32 over all experts, the best K, their weights scaled to sum 1.
That is what DeepSpeed's gate does. Legend: N tokens of a step, T of this rank, K experts per token,
E experts, H hidden, I rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP, EPImplementation

from benchmarks.autoep import EXPERTS, autoep_layer
from benchmarks.ranks import rank, world_size
from benchmarks.stages import LayerParts
from resmoe_dist.codecs import DenseMatrix
from resmoe_dist.design_matrix import row_range
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.parallel.dispatch import dispatcher_for
from resmoe_dist.parallel.topology import Topology, owned_experts
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.testing.random_layer import RandomLayer


class Router(nn.Module):
    """(index [T, K], weights [T, K]) of tokens [T, H]. weight_EH: float32."""

    def __init__(self, weight_EH: Tensor, top_k: int) -> None:
        super().__init__()
        self.weight_EH, self.top_k = nn.Parameter(weight_EH, requires_grad=False), top_k

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        gates_TE = F.linear(x_TH.float(), self.weight_EH).softmax(-1)
        weights_TK, index_TK = gates_TE.topk(self.top_k, dim=-1)
        return index_TK, weights_TK / weights_TK.sum(-1, keepdim=True)


@dataclass(frozen=True)
class System:
    """A layer on this rank.

    batches: how many different batches the ranks carry together; batch: this rank's. parts: its
    modules; the block turns tokens [T, H] into the output [T, H]. bytes: of this rank's expert
    weights. copied_bytes: weights that a rank copies for each token of a step.
    """

    name: str
    batches: int
    batch: int
    parts: LayerParts
    bytes: int
    copied_bytes: int = 0

    def run(self, x_TH: Tensor) -> Tensor:
        """The layer's output for this rank's tokens."""
        return self.parts.block(x_TH)

    def share(self, x_NH: Tensor) -> Tensor:
        """This rank's tokens of a step."""
        return x_NH[slice(*row_range(len(x_NH), self.batch, self.batches))]


class _Block(nn.Module):
    """A layer that is a function. Its parts are not submodules, so that they can be shared."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = (run,)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.run[0](x_TH)


def our_systems(
    layer: RandomLayer, router: Router, topologies: list[Topology], forms: list[str]
) -> Iterator[System]:
    """Each form of dispatch on each number of lanes, with compressed and with dense experts.

    topologies: the same grid with different numbers of lanes.
    """
    for codec, weights in (("resmoe", layer.weights), ("resmoe-dense", _dense_weights(layer))):
        execution = execution_for()
        held = CompressedExperts(_shard(weights, topologies[0]), execution)
        held.prepare()
        for place in topologies:
            for form in _forms_on(place, forms):
                dispatcher = dispatcher_for(layer.shape.experts, place, form)
                moe = ResMoE(
                    layer.shape.hidden, held, layer.shape.experts, place, dispatcher=dispatcher
                ).eval()
                name = f"{codec} {form}, {place.lanes} lane{'s' if place.lanes > 1 else ''}"
                block = _Block(partial(_route_and_run, router, moe))
                size = sum(buffer.nbytes for buffer in held.buffers())
                yield System(name, place.lanes, place.lane, LayerParts(block, router, held), size)


def _forms_on(place: Topology, forms: list[str]) -> list[str]:
    """Those of `forms` that differ from one another on a grid."""
    if place.replica_size == 1:
        return ["exchange"]
    usable = ("shared_batch", "exchange") if place.replica_lanes == 1 else ("decode", "exchange")
    return [form for form in forms if form in usable]


def _route_and_run(router: Router, experts: nn.Module, x_TH: Tensor) -> Tensor:
    index_TK, weights_TK = router(x_TH)
    return experts(x_TH, index_TK, weights_TK)


def _dense_weights(layer: RandomLayer) -> LayerWeights:
    """The restored experts as dense design matrices, without a centre."""
    gate_up_EIH = layer.gate_up.chunk(2, 1)
    matrices = (
        torch.cat([gate_IH, up_IH, down_HI.T], 1)
        for gate_IH, up_IH, down_HI in zip(*gate_up_EIH, layer.down, strict=True)
    )
    return LayerWeights(
        layer.shape.expert,
        tuple(DenseMatrix.of(matrix_ID) for matrix_ID in matrices),
        centers=(),
        center_of=(-1,) * layer.shape.experts,
        activation=PlainActivation("silu"),
    )


def _shard(weights: LayerWeights, place: Topology) -> LayerWeights:
    """This rank's experts, and its rows of them and of the centres."""
    owned = place.owned_experts(weights.num_experts)
    rows = row_range(weights.shape.rows, place.tp_rank, place.tp)
    return LayerWeights(
        weights.shape,
        tuple(weights.residuals[k].slice_rows(*rows) for k in owned),
        tuple(center.slice_rows(*rows) for center in weights.centers),
        tuple(weights.center_of[k] for k in owned),
        weights.activation,
    )


class _Mlp(nn.Module):
    """One dense expert for DeepSpeed: two products, as its users write it."""

    def __init__(self, gate_up_JH: Tensor, down_HI: Tensor) -> None:
        super().__init__()
        self.gate_up_JH = nn.Parameter(gate_up_JH, requires_grad=False)
        self.down_HI = nn.Parameter(down_HI, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        # DeepSpeed gives a strided view, for which PyTorch would expand and copy the weights.
        gate, up = F.linear(x.contiguous(), self.gate_up_JH).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_HI)


def deepspeed_system(layer: RandomLayer, router: Router) -> System:
    """Stock `deepspeed.moe.layer.MoE`, all ranks one expert-parallel group, no token dropped."""
    moe, run = stock_moe(router.weight_EH, layer.gate_up, layer.down, layer.shape.top_k)
    inner = moe.deepspeed_moe
    size = sum(parameter.nbytes for parameter in inner.experts.parameters())
    parts = LayerParts(_Block(run), inner.gate, inner.experts)
    return System("deepspeed MoE", world_size(), rank(), parts, size)


def autoep_systems(layer: RandomLayer, router: Router) -> Iterator[System]:
    """DeepSpeed AutoEP over all ranks, with each way to multiply with its experts."""
    for experts in EXPERTS:
        run, made = autoep_layer(layer, router.weight_EH, experts)
        size = sum(parameter.nbytes for parameter in made.experts.parameters())
        parts = LayerParts(_Block(run), made.router, made.experts)
        yield System(f"autoep ({experts})", world_size(), rank(), parts, size)


def stock_moe(
    router_EH: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor, top_k: int
) -> tuple[MoE, Callable[[Tensor], Tensor]]:
    """DeepSpeed's layer over all ranks, with a copy of this rank's experts; and how to run it.

    router_EH: in float32. gate_up_EJH, down_EHI: of all experts, as in transformers (J = 2I).
    Raises UserError if the experts do not divide over the ranks.
    """
    ranks, (experts, hidden) = world_size(), router_EH.shape
    owned = owned_experts(experts, rank(), ranks)
    moe = MoE(
        hidden,
        nn.Identity(),
        experts,
        ranks,
        top_k,
        min_capacity=0,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).eval()
    inner = moe.deepspeed_moe
    inner.gate.wg.weight = nn.Parameter(router_EH, requires_grad=False)
    inner.experts.deepspeed_experts = nn.ModuleList(
        _Mlp(gate_up_EJH[k].detach().clone(), down_EHI[k].detach().clone()) for k in owned
    )
    # Not `set_deepspeed_parallelism`: DeepSpeed would arrange the group for the grid's TP size.
    if ranks > 1:
        inner._set_ep_group(torch.distributed.group.WORLD)

    def run(x: Tensor) -> Tensor:
        with _without_model_parallelism():
            return moe(x)[0]

    return moe, run


@contextmanager
def _without_model_parallelism() -> Iterator[None]:
    """Hide the grid's TP from DeepSpeed's layer, which has none: every rank has its own tokens."""
    mpu, groups.mpu = groups.mpu, None
    try:
        yield
    finally:
        groups.mpu = mpu


def transformers_systems(
    layer: RandomLayer, router: Router, implementations: tuple[str, ...]
) -> Iterator[System]:
    """transformers' expert parallelism over all ranks, with each implementation of experts."""
    ranks, device = world_size(), layer.gate_up.device.type
    whole = init_device_mesh(device, (ranks, 1), mesh_dim_names=("ep", "tp"))
    owned = owned_experts(layer.shape.experts, rank(), ranks)
    for implementation in implementations:
        experts = layer.dense(implementation)
        experts.gate_up_proj = _part(layer.gate_up, owned)
        experts.down_proj = _part(layer.down, owned)
        experts.num_experts, experts._is_expert_parallel = len(owned), True
        size = sum(parameter.nbytes for parameter in experts.parameters())
        # Called as a module, so that its calls can be timed.
        called = SimpleNamespace(forward=experts.__call__, num_experts=len(owned))
        choices: list[tuple[type[EPImplementation], str, int]] = [
            (AllToAllEP, "all_to_all", ranks),
            (AllToAllEP, "all_to_all, 1 batch", 1),
            (AllReduceEP, "all_reduce, 1 batch", 1),
        ]
        for kind, name, batches in choices:
            shared = whole["ep"] if batches == 1 else whole["tp"]
            dispatch = kind(called, whole["ep"], shared)
            block = _Block(partial(_route_and_run, router, partial(_in_dtype, dispatch)))
            batch = rank() if batches > 1 else 0
            copied = layer.shape.top_k * layer.shape.expert_bytes
            if implementation != "batched_mm":
                copied = 0
            elif kind is AllToAllEP:
                copied //= ranks
            name = f"transformers {name} ({implementation})"
            parts = LayerParts(block, router, experts)
            yield System(name, batches, batch, parts, size, copied)


def _in_dtype(dispatch: EPImplementation, x_TH: Tensor, *routing: Tensor) -> Tensor:
    """As transformers calls it: the output in the dtype of the tokens."""
    return dispatch(x_TH, *routing).to(x_TH.dtype)


def _part(weights: Tensor, owned: range) -> nn.Parameter:
    return nn.Parameter(weights[owned.start : owned.stop], requires_grad=False)
