"""Everything that is no expert, sharded over the ranks of a lane by transformers' own plan.

transformers names a style for each module: `colwise` keeps a slice of a linear layer's outputs,
`rowwise` a slice of its inputs and adds up the partial outputs, and so on. Its code decides which
slice each rank keeps, and reads only that slice from disk. Here are the forward passes on plain
local tensors, with collectives that suit few tokens and the same bits on every rank.

Attention is divided as far as its heads divide: with 8 ranks and 4 key/value heads, the ranks hold
it in two copies of 4 parts. A model without a plan stays whole on every rank.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from resmoe_dist.parallel.collectives import Group, gather, sum_over
from resmoe_dist.parallel.topology import Topology, group_of

logger = logging.getLogger(__name__)

# Styles that change nothing at inference once their parameters are local.
_LOCAL = (
    "colwise",
    "packed_colwise",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "local_params",
    "replicate",
)

# Rules of the base model that transformers 5.23 lacks, by model type.
_MISSING_RULES = {
    "deepseek_v3": {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    },
    "gpt_oss": {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    },
}


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
    """Shards one model while it is loaded: `plan` before its weights are read, `finish` after."""

    def __init__(self, topology: Topology, expert_modules: list[str]) -> None:
        self.topology = topology
        self.expert_modules = expert_modules
        self._styles: dict[str, tuple[str, _Part]] = {}

    def plan(self, model: PreTrainedModel) -> None:
        """Mark the parameters of which this rank reads a slice. Collective over the world."""
        size = self.topology.lane_size
        rules = self._rules(model)
        unknown = {style for style in rules.values() if style not in (*_LOCAL, *_FORWARDS)}
        if size == 1 or not rules or unknown:
            if size > 1:
                reason = f"unknown styles {sorted(unknown)}" if unknown else "no plan"
                self._say(f"{type(model).__name__}: only experts are divided ({reason})")
            return
        heads = _head_counts(model)
        attention_size = math.gcd(size, *heads) if heads else 1
        parts = {n: self._part(n) for n in {size, attention_size}}
        if attention_size < size:
            self._say(
                f"attention is divided among {attention_size} of {size} ranks: it has "
                f"{' and '.join(map(str, heads)) or 'varying'} (key/value) heads"
            )
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for name, style in rules.items():
            part = parts[attention_size if _is_in_attention(name, modules) else size]
            if part.size == 1:
                continue
            if name in parameters:
                owner, _, parameter = name.rpartition(".")
                ALL_PARALLEL_STYLES[style].shard_param(modules[owner], parameter, part.mesh)
            else:
                self._styles[name] = style, part

    def finish(self, model: PreTrainedModel) -> None:
        """Make the loaded slices plain tensors, and let their modules work together."""
        # Tied modules keep sharing one parameter.
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter.data, DTensor):
                    if id(parameter) not in made:
                        made[id(parameter)] = _own_copy(parameter.data.to_local())
                    module.register_parameter(name, made[id(parameter)])
        for name, (style, part) in self._styles.items():
            forward = _FORWARDS.get(style)
            if forward is not None:
                module = model.get_submodule(name)
                module.forward = partial(forward, module, part)

    def _rules(self, model: PreTrainedModel) -> dict[str, str]:
        """transformers' style of each module and parameter, except of experts."""
        if not model.tp_plan:
            return {}
        config = DistributedConfig(tp_size=self.topology.lane_size, tp_plan="auto")
        prefix, missing = model.base_model_prefix, _MISSING_RULES.get(model.config.model_type, {})
        # Names that a variant of the architecture does not have match nothing.
        parts = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        generic = {re.sub(r"\.\d+\.", ".*.", name) for name in parts}
        added = {f"{prefix}.{name}": style for name, style in missing.items()}
        model.tp_plan = {
            name: style for name, style in added.items() if name in generic
        } | model.tp_plan
        rules, _, _ = model._resolve_parallel_plans(config)
        return {
            name: style
            for name, style in rules.items()
            if not any(
                name == experts or name.startswith(f"{experts}.") for experts in self.expert_modules
            )
        }

    def _say(self, text: str) -> None:
        """Once per grid."""
        place = self.topology
        if place.ep_rank == place.tp_rank == place.dp_rank == 0:
            logger.warning(text)

    def _part(self, size: int) -> _Part:
        place = self.topology
        world = range(place.dp * place.replica_size)
        rank = (place.dp_rank * place.ep + place.ep_rank) * place.tp + place.tp_rank
        existing = [group for group in (place.lane_group, place.tp_group) if group is not None]
        group = group_of(rank, [world[i : i + size] for i in world[::size]], existing)
        return _Part(size, rank % size, group)


def _own_copy(slice_: Tensor) -> nn.Parameter:
    """A parameter of this slice, without the memory of the tensor that it may be a view of."""
    whole = slice_.untyped_storage().nbytes() > slice_.nbytes
    return nn.Parameter(slice_.detach().clone() if whole else slice_.detach(), requires_grad=False)


def _head_counts(model: PreTrainedModel) -> list[int]:
    """Numbers that the parts of attention must divide: heads, and key/value heads."""
    config = model.config.get_text_config()
    counts = [config.num_attention_heads]
    # Latent attention (MLA) expands one latent to all heads.
    if getattr(config, "kv_lora_rank", None) is None:
        counts.append(getattr(config, "num_key_value_heads", None) or counts[0])
    return counts if all(isinstance(count, int) for count in counts) else []


def _is_in_attention(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module or parameter belongs to an attention block with heads."""
    parents = name.split(".")
    owners = (".".join(parents[:i]) for i in range(1, len(parents)))
    return any(hasattr(modules.get(owner), "scaling") for owner in owners)


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
    rows = F.embedding(local.masked_fill(elsewhere, 0), module.weight)
    rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return sum_over(rows.flatten(0, -2), part.group).view_as(rows)


_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "rowwise": _rowwise,
    "rowwise_split_input": _rowwise_split_input,
    "colwise_gather_output": _colwise_gather_output,
    "embedding_rowwise": _embedding_rowwise,
}
