"""Routers of the experts that compression kept: a dropped expert is never chosen.

Leaving out what a router sends to a dropped expert would give a token fewer experts than it should
have. So the router chooses among the kept ones, as in the smaller model that `restore` writes. Each
block is built for as many experts as its layer keeps. The per-expert tensors outside the experts
are read whole, and then cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resmoe_dist.checkpoints.entries import LayerEntry
from resmoe_dist.errors import UserError
from resmoe_dist.families.router_blocks import RouterBlock, router_blocks
from resmoe_dist.families.sites import find_expert_sites
from resmoe_dist.families.smaller import (
    Cut,
    PerExpert,
    SmallerModel,
    check_routable,
    fewer_experts,
)


class KeptExperts:
    """Makes the routers of one model smaller: `plan` before its weights are read, `finish` after.

    layers: of the checkpoint; those that dropped no expert are left alone.
    """

    def __init__(self, layers: Sequence[LayerEntry]) -> None:
        self._layers = [layer for layer in layers if layer.has_dropped]
        self._cuts: dict[str, Cut] = {}
        # How many entries each tensor to cut has in the files.
        self._sizes: dict[str, int] = {}

    def plan(self, model: PreTrainedModel) -> None:
        """Put blocks with fewer experts into a model on the meta device.

        Raises UserError if the family cannot have fewer experts, or a router cannot choose as
        before.
        """
        if not self._layers:
            return
        sites = {site.module: site for site in find_expert_sites(model)}
        smaller: dict[tuple[int, int], SmallerModel | None] = {}
        blocks: dict[tuple[int, int], dict[str, RouterBlock]] = {}
        # Before any block is replaced, since the whole models are compared.
        for layer in self._layers:
            size = layer.num_experts, len(layer.kept_experts)
            if size not in smaller:
                # In the context of `from_pretrained`, with its dtype and on the meta device.
                found = smaller[size] = fewer_experts(model, *size, build=type(model))
                blocks[size] = {} if found is None else router_blocks(found)
            found = smaller[size]
            if found is None or layer.module not in blocks[size]:
                raise UserError(
                    f"{layer.module}: {size[1]} of {size[0]} experts are stored, and a "
                    f"{type(model).__name__} cannot have fewer; compress it without dropping"
                )
            check_routable(found, layer.num_experts, layer.kept_experts)
        for layer in self._layers:
            size = layer.num_experts, len(layer.kept_experts)
            found = smaller[size]
            assert found is not None
            for module in sites[layer.module].modules:
                block = blocks[size][module]
                model.set_submodule(block.name, found.model.get_submodule(block.name))
                for name, tensor in block.tensors.items():
                    _make_whole(model, name, tensor)
                    entries = tensor.kept(layer.num_experts, layer.kept_experts)
                    self._cuts[name] = Cut(tensor.dim, entries)
                    self._sizes[name] = tensor.size

    def finish(self, model: PreTrainedModel) -> None:
        """Keep the entries of the kept experts."""
        for name, cut in self._cuts.items():
            owner, leaf = _owner(model, name)
            whole: Tensor = getattr(owner, leaf)
            if whole.shape[cut.dim] != self._sizes[name]:
                raise UserError(
                    f"{name}: is divided among ranks by expert, so experts cannot be dropped; "
                    "serve with --ep 1 --tp 1"
                )
            _set(owner, leaf, cut.of(whole.detach()))


def _make_whole(model: PreTrainedModel, name: str, tensor: PerExpert) -> None:
    """Give a tensor the shape that it has in the files."""
    owner, leaf = _owner(model, name)
    few: Tensor = getattr(owner, leaf)
    shape = list(few.shape)
    shape[tensor.dim] = tensor.size
    _set(owner, leaf, torch.empty(shape, dtype=few.dtype, device=few.device))


def _owner(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _set(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Replace a parameter or a buffer."""
    if leaf in owner._parameters:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
