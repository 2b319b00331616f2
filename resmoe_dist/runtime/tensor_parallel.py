"""Everything that is no expert, sharded over the ranks of a lane by transformers' own plan.

`sharding_rules` decides who holds which slice. transformers' code divides the parameters by it, and
reads only this rank's slice from disk. Here are the forward passes on plain local tensors, with
collectives that suit few tokens and the same bits on every rank.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from resmoe_dist.parallel.collectives import Group, gather, sum_over
from resmoe_dist.parallel.topology import Topology, group_of
from resmoe_dist.runtime.sharding_rules import sharding_rules


@dataclass(frozen=True)
class _Part:
    """The ranks that divide a module among them: how many, which of them this is, their group."""

    size: int
    rank: int
    group: Group | None

    @property
    def mesh(self) -> DeviceMesh:
        """For transformers' code, which asks it who holds which slice."""
        assert self.group is not None
        return DeviceMesh.from_group(self.group, "cpu", mesh_dim_names=("tp",))


class LaneSharding:
    """Shards one model while it is loaded: `plan` before its weights are read, `finish` after.

    remark: of `plan`, what could not be divided; None if nothing.
    """

    def __init__(self, topology: Topology, expert_modules: list[str]) -> None:
        self.topology = topology
        self.expert_modules = expert_modules
        self.remark: str | None = None
        self._styles: dict[str, tuple[str, _Part]] = {}

    def plan(self, model: PreTrainedModel) -> None:
        """Mark the parameters of which this rank reads a slice. Collective over the world.

        A topology without process groups, as when one rank's shard is inspected alone, divides only
        experts.
        """
        if self.topology.lane_group is None:
            return
        rules = sharding_rules(model, self.expert_modules, self.topology.lane_size)
        self.remark = rules.remark
        parts = {n: self._part(n) for n in sorted({each.parts for each in rules.divided.values()})}
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for name, division in rules.divided.items():
            part = parts[division.parts]
            if name in parameters:
                owner, _, parameter = name.rpartition(".")
                style = ALL_PARALLEL_STYLES[division.style]
                style.shard_param(modules[owner], parameter, part.mesh)
            else:
                self._styles[name] = division.style, part

    def finish(self, model: PreTrainedModel) -> None:
        """Make the loaded slices plain tensors, and let their modules work together.

        Whole parameters are copied too. They are views of mapped files, and one that is left would
        keep all pages of its file that were read in this process.
        """
        if self.topology.lane_group is None:
            return
        # Tied modules keep sharing one parameter.
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in made:
                    made[id(parameter)] = _own_copy(parameter.data)
                module.register_parameter(name, made[id(parameter)])
        for name, (style, part) in self._styles.items():
            forward = _FORWARDS.get(style)
            if forward is not None:
                module = model.get_submodule(name)
                if isinstance(module, nn.Embedding):
                    # It counts rows of the whole vocabulary, and matters for gradients only.
                    module.padding_idx = None
                module.forward = partial(forward, module, part)

    def _part(self, size: int) -> _Part:
        place = self.topology
        world = range(place.dp * place.replica_size)
        rank = place.rank
        existing = [group for group in (place.lane_group, place.tp_group) if group is not None]
        group = group_of(rank, [world[i : i + size] for i in world[::size]], existing)
        return _Part(size, rank % size, group)


def _own_copy(data: Tensor) -> nn.Parameter:
    """A parameter of this rank's slice, without the memory that it is a view of."""
    local = data.to_local() if isinstance(data, DTensor) else data
    return nn.Parameter(local.detach().clone(), requires_grad=False)


def _rowwise(module: Any, part: _Part, x: Tensor) -> Tensor:
    """Partial products of this rank's inputs, added up over the part."""
    assert part.group is not None
    partial_y = F.linear(x, module.weight)
    y = sum_over(partial_y.flatten(0, -2), part.group).view_as(partial_y)
    return y if module.bias is None else y + module.bias


def _rowwise_split_input(module: Any, part: _Part, x: Tensor) -> Tensor:
    """The same for inputs that every rank has whole."""
    return _rowwise(module, part, _slice_of(x, part))


def _slice_of(x: Tensor, part: _Part) -> Tensor:
    """This rank's slice of the last dimension, as DTensor's `Shard` divides it."""
    width = -(-x.shape[-1] // part.size)
    return x[..., part.rank * width : (part.rank + 1) * width]


def _colwise_gather_output(module: Any, part: _Part, x: Tensor) -> Tensor:
    """This rank's outputs, and those of the other ranks."""
    assert part.group is not None
    mine = F.linear(x, module.weight, module.bias)
    # All but the last ranks have slices of this width.
    width = -(-module.out_features // part.size)
    padded_TW = F.pad(mine, (0, width - mine.shape[-1])).flatten(0, -2)
    all_PTW = gather(padded_TW, part.group).view(part.size, *padded_TW.shape)
    whole = all_PTW.movedim(0, 1).flatten(1)[:, : module.out_features]
    return whole.reshape(*x.shape[:-1], module.out_features)


def _embedding_rowwise(module: Any, part: _Part, ids: Tensor) -> Tensor:
    """Each rank looks up the tokens of its slice of the vocabulary; the others add zeros."""
    assert part.group is not None
    first = part.rank * -(-module.num_embeddings // part.size)
    local = ids - first
    elsewhere = (local < 0) | (local >= len(module.weight))
    # The family's own forward, which may scale what it looks up.
    rows = type(module).forward(module, local.masked_fill(elsewhere, 0))
    rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return sum_over(rows.flatten(0, -2), part.group).view_as(rows)


# The other styles change nothing at inference once their parameters are local.
_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "rowwise": _rowwise,
    "rowwise_split_input": _rowwise_split_input,
    "colwise_gather_output": _colwise_gather_output,
    "embedding_rowwise": _embedding_rowwise,
}
