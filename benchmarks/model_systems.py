"""A whole model as each library serves it on the same ranks, with the same weights.

    resmoe, resmoe-dense   `load_model` on the grid, compressed or with codec `dense`
    deepspeed MoE          plain transformers on every rank, its MoE blocks replaced by
                           `deepspeed.moe.layer.MoE`, one expert-parallel position per rank
    autoep                 the same, its MoE blocks replaced by DeepSpeed AutoEP
    transformers …         its own expert parallelism (`DistributedConfig`), everything else sharded
                           by its tensor-parallel plan
    transformers, 1 rank   the dense model on rank 0 with all cores

Legend: B sequences, S prompt tokens, H hidden.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.expert_parallel import (
    AllReduceEP,
    AllToAllEP,
    EPImplementation,
    EPImplementationInterface,
)

from benchmarks.autoep import use_autoep
from benchmarks.moe_systems import stock_moe
from benchmarks.ranks import barrier, rank, world_size
from benchmarks.stages import LayerParts
from resmoe_dist.design_matrix import row_range
from resmoe_dist.families.models import load_config, model_class
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.loading import load_model


@dataclass(frozen=True)
class ModelSystem:
    """A model on this rank.

    model: None on ranks that do not take part. batches: how many different batches the ranks carry
    together; batch: this rank's. implementation: of transformers' experts; None for ours and
    DeepSpeed's. threads: of this rank; None leaves them. ranks_per_copy: that each compute a part
    of every routed copy.
    """

    name: str
    model: PreTrainedModel | None
    batches: int
    batch: int
    implementation: str | None = None
    threads: int | None = None
    ranks_per_copy: int = 1

    def share(self, ids_BS: Tensor) -> Tensor:
        """This rank's sequences of a batch."""
        return ids_BS[slice(*row_range(len(ids_BS), self.batch, self.batches))]

    @property
    def top_k(self) -> int:
        """Experts per token; 0 on ranks that do not take part."""
        return 0 if self.model is None else self.model.config.num_experts_per_tok

    @property
    def parts(self) -> list[LayerParts]:
        """Its MoE layers."""
        blocks = [] if self.model is None else [layer.mlp for layer in self.model.model.layers]
        return [_parts_of(block) for block in blocks]


def our_model_systems(
    compressed: Path, dense: Path, dtype: torch.dtype, topologies: list[Topology], form: str
) -> Iterator[ModelSystem]:
    """The compressed and the dense codec, on the grid with each number of lanes.

    form: of dispatch; lanes that cannot use it take `auto`.
    """
    for place in topologies:
        lanes = f"{place.lanes} lane{'s' if place.lanes > 1 else ''}"
        for name, folder in (("resmoe", compressed), ("resmoe-dense", dense)):
            usable = "auto" if form == "shared_batch" and place.replica_lanes > 1 else form
            model = load_model(folder, dtype=dtype, topology=place, dispatch=usable)
            yield ModelSystem(
                f"{name}, {lanes}", model, place.lanes, place.lane, ranks_per_copy=place.tp
            )


def one_rank_systems(
    folder: Path, dtype: torch.dtype, implementations: list[str]
) -> Iterator[ModelSystem]:
    """Plain transformers on rank 0, with all cores, in each implementation of experts."""
    model = _plain_model(folder, dtype) if rank() == 0 else None
    cores = len(os.sched_getaffinity(0))
    for name in implementations:
        yield ModelSystem(f"transformers, 1 rank ({name})", model, 1, 0, name, cores)


def transformers_model_systems(
    folder: Path, dtype: torch.dtype, implementations: list[str], kinds: list[str]
) -> Iterator[ModelSystem]:
    """transformers' expert parallelism over all ranks, which share one batch.

    Its tensor parallelism divides everything else, if the heads divide over the ranks.
    The loaded model is distributed, because `from_pretrained` with a DistributedConfig needs
    accelerate. Its parts are the same.
    """
    ranks, cls = world_size(), model_class(load_config(str(folder)))
    text = load_config(str(folder)).get_text_config()
    heads = math.gcd(text.num_attention_heads, text.num_key_value_heads)
    plan: Any = {} if heads % ranks else "auto"
    for kind in kinds:
        EPImplementationInterface.register(f"timed_{kind}", _TIMED[kind])
        config = DistributedConfig(
            tp_size=ranks, tp_plan=plan, ep_size=ranks, ep_implementation=f"timed_{kind}"
        )
        config, _, meshes = cls.prepare_distribute_model(config)
        model = in_turns(
            lambda config=config, meshes=meshes: _own_slices(
                cls.maybe_distribute_model(_plain_model(folder, dtype), config, meshes)
            )
        )
        for name in implementations:
            yield ModelSystem(f"transformers {kind} ({name})", model, 1, 0, name)


def _own_slices(model: PreTrainedModel) -> PreTrainedModel:
    """Give the slices that this rank keeps memory that is not the whole tensor's."""
    for parameter in model.parameters():
        if isinstance(parameter.data, DTensor):
            local = parameter.data.to_local()
            parameter.data._local_tensor = local.clone()
    return model


def in_turns(load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `load` returns, one rank after the other: each needs a whole model for a moment."""
    for turn in range(world_size()):
        if turn == rank():
            model = load()
        barrier()
    return model


def deepspeed_model_system(folder: Path, dtype: torch.dtype) -> ModelSystem:
    """Stock DeepSpeed MoE blocks in a replicated model; every rank has its own batch."""

    def load() -> PreTrainedModel:
        model = _plain_model(folder, dtype)
        for layer in model.model.layers:
            layer.mlp = DeepSpeedBlock(layer.mlp)
        return model

    return ModelSystem("deepspeed MoE", in_turns(load), world_size(), rank())


def autoep_model_system(folder: Path, dtype: torch.dtype) -> ModelSystem:
    """DeepSpeed AutoEP in a replicated model; every rank has its own batch."""
    model = in_turns(lambda: use_autoep(_plain_model(folder, dtype), "grouped_mm"))
    return ModelSystem("autoep (grouped_mm)", model, world_size(), rank())


class DeepSpeedBlock(nn.Module):
    """A Mixtral block with DeepSpeed's MoE, which holds a copy of this rank's experts."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.moe, self.run = stock_moe(
            block.gate.weight.float(), block.experts.gate_up_proj, block.experts.down_proj,
            block.top_k,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.run(hidden_states)


class _CalledAsModule(nn.Module):
    """A function as a module, so that its calls can be watched."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = (function,)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function[0](*inputs)


def _timed(kind: type[EPImplementation]) -> type[EPImplementation]:
    """The same with experts that can be watched, as `watched_experts` of their module."""

    class Timed(kind):  # type: ignore[misc, valid-type]
        def __init__(self, experts: nn.Module, *meshes: Any, **named: Any) -> None:
            super().__init__(experts, *meshes, **named)
            self.experts_forward = _CalledAsModule(self.experts_forward)
            self.experts_forward.num_experts = self.num_local_experts
            vars(experts)["watched_experts"] = self.experts_forward

    return Timed


_TIMED = {"all_to_all": _timed(AllToAllEP), "all_reduce": _timed(AllReduceEP)}


def _parts_of(block: Any) -> LayerParts:
    if isinstance(block, DeepSpeedBlock):
        inner = block.moe.deepspeed_moe
        return LayerParts(block, inner.gate, inner.experts)
    if isinstance(block, AutoEPMoELayer):
        return LayerParts(block, block.router, block.experts)
    experts = block.experts
    if isinstance(experts, ResMoE):
        return LayerParts(block, block.gate, experts.experts)
    return LayerParts(block, block.gate, vars(experts).get("watched_experts", experts))


def _plain_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    kind = model_class(load_config(str(folder)))
    return kind.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
