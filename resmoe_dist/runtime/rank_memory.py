"""Bytes that a loaded model holds on this rank, counted on its live tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from resmoe_dist.runtime.layer import ResMoE


@dataclass(frozen=True)
class RankMemory:
    """center_bytes, residual_bytes (values, indices, output biases) and other_bytes of one rank.

    groups: that the rank has experts of, over all layers. num_experts: of a layer, over all ranks.
    dense_expert_bytes: of all experts of the model, if they were dense in the model's dtype.
    """

    center_bytes: int
    residual_bytes: int
    other_bytes: int
    groups: int
    num_experts: int
    dense_expert_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Centre and residuals."""
        return self.center_bytes + self.residual_bytes

    @property
    def all_bytes(self) -> int:
        """Experts and everything else."""
        return self.expert_bytes + self.other_bytes


def tensor_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's tensors on this rank; those that share storage count once."""
    tensors = (
        tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for tensor in chain(model.parameters(), model.buffers())
    )
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident_bytes(model: PreTrainedModel) -> int:
    """Bytes that a model occupies on this rank: its tensors, and what kernels made of them."""
    layers = (module for module in model.modules() if isinstance(module, ResMoE))
    return tensor_bytes(model) + sum(layer.experts.backend.prepared_bytes for layer in layers)


def rank_memory(model: PreTrainedModel) -> RankMemory:
    """Measure a model. Tensors that share storage are counted once."""
    layers = [module for module in model.modules() if isinstance(module, ResMoE)]
    center = sum(layer.experts.center_bytes for layer in layers)
    residual = sum(layer.experts.residual_bytes for layer in layers)
    # Without what kernels prepared, which belongs to residuals but is not a tensor of the model.
    stored = sum(buffer.nbytes for layer in layers for buffer in layer.experts.buffers())
    return RankMemory(
        center_bytes=center,
        residual_bytes=residual,
        other_bytes=tensor_bytes(model) - stored,
        groups=sum(layer.experts.num_groups for layer in layers),
        num_experts=layers[0].num_experts if layers else 0,
        dense_expert_bytes=model.dtype.itemsize
        * sum(layer.experts.model_entries for layer in layers),
    )
