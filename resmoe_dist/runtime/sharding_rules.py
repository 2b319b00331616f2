"""How the ranks of a lane divide everything that is no expert: the decision, without any process.

transformers names a style for each module: `colwise` keeps a slice of a linear layer's outputs,
`rowwise` a slice of its inputs and adds up the partial outputs, and so on.

Attention is divided as far as its heads divide: with 8 ranks and 4 key/value heads, the ranks hold
it in two copies of 4 parts. A model without a plan stays whole on every rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig


@dataclass(frozen=True)
class Style:
    """The dimension of a parameter that a style divides, counted from the last; None: none.

    matrix: of weights. vector: of biases and other parameters of one dimension. stacked: matrices
    in one weight (gate and up), each of which is divided.
    """

    matrix: int | None = None
    vector: int | None = None
    stacked: int = 1


# Every style that the runtime can run.
STYLES = {
    "colwise": Style(matrix=-2, vector=-1),
    "colwise_gather_output": Style(matrix=-2, vector=-1),
    "packed_colwise": Style(matrix=-2, vector=-1, stacked=2),
    "rowwise": Style(matrix=-1),
    "rowwise_split_input": Style(matrix=-1),
    "embedding_rowwise": Style(matrix=-2),
    "replicated_with_grad_allreduce": Style(),
    "mla_kv_a_proj": Style(),
    "local_params": Style(),
    "replicate": Style(),
}

_COLUMNS = ("colwise", "packed_colwise")

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
class Division:
    """A module or parameter in `parts` slices. style: one of `STYLES`."""

    style: str
    parts: int

    def largest_slice(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the largest slice of a parameter, which the first rank holds.

        As DTensor divides it: all slices but the last ones have ⌈n / parts⌉ entries.
        """
        style = STYLES[self.style]
        dimension = style.vector if len(shape) == 1 else style.matrix
        found = list(shape)
        if dimension is not None:
            stacked = style.stacked if len(shape) > 1 else 1
            found[dimension] = stacked * -(-shape[dimension] // stacked // self.parts)
        return tuple(found)


@dataclass(frozen=True)
class ShardingRules:
    """divided: by name of the module or parameter. remark: what a user should know, or None."""

    divided: dict[str, Division] = field(default_factory=dict)
    remark: str | None = None


def sharding_rules(
    model: PreTrainedModel, expert_modules: Sequence[str], lane_size: int
) -> ShardingRules:
    """How the `lane_size` ranks of a lane divide a model, whose parameters may be on meta.

    expert_modules: names of the modules that hold experts; they and what is in them are left out.
    """
    if lane_size == 1:
        return ShardingRules()
    styles = _styles(model, expert_modules, lane_size)
    unknown = set(styles.values()) - STYLES.keys()
    if not styles or unknown:
        reason = f"unknown styles {sorted(unknown)}" if unknown else "no plan"
        return ShardingRules(remark=f"{type(model).__name__}: only experts are divided ({reason})")
    if _ties_whole_to_divided(model, styles):
        why = "modules that are divided share weights with others that are not"
        return ShardingRules(remark=f"{type(model).__name__}: only experts are divided ({why})")
    remark = None
    heads = _head_counts(model)
    attention_parts = math.gcd(lane_size, *heads) if heads else 1
    if attention_parts < lane_size:
        remark = (
            f"attention is divided among {attention_parts} of {lane_size} ranks: it has "
            f"{' and '.join(map(str, heads)) or 'varying'} (key/value) heads"
        )
    modules = dict(model.named_modules())
    divided = {}
    for name, style in styles.items():
        parts = attention_parts if _is_in_attention(name, modules) else lane_size
        if parts > 1:
            divided[name] = Division(style, parts)
    return ShardingRules(divided, remark)


def _styles(
    model: PreTrainedModel, expert_modules: Sequence[str], lane_size: int
) -> dict[str, str]:
    """transformers' style of each module and parameter, except of experts.

    A rule for an output projection also matches blocks whose other projections have no rule, such
    as linear attention in a model that has both kinds. Their inputs are whole, so they stay whole.
    """
    if not model.tp_plan:
        return {}
    config = DistributedConfig(tp_size=lane_size, tp_plan="auto")
    prefix, missing = model.base_model_prefix, _MISSING_RULES.get(model.config.model_type, {})
    # Names that a variant of the architecture does not have match nothing.
    parts = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    generic = {re.sub(r"\.\d+\.", ".*.", name) for name in parts}
    added = {f"{prefix}.{name}": style for name, style in missing.items()}
    model.tp_plan = {
        name: style for name, style in added.items() if name in generic
    } | model.tp_plan
    styles, _, _ = model._resolve_parallel_plans(config)
    styles = {
        name: style
        for name, style in styles.items()
        if not any(name == experts or name.startswith(f"{experts}.") for experts in expert_modules)
    }
    divides_outputs = {_block(name) for name, style in styles.items() if style in _COLUMNS}
    return {
        name: style
        for name, style in styles.items()
        if style != "rowwise" or _block(name) in divides_outputs
    }


def _block(name: str) -> str:
    """The block of a projection or of its parameter, also if a wrapper calls it `linear`."""
    return re.sub(r"(\.linear)?(\.weight|\.bias)?$", "", name).rpartition(".")[0]


def _ties_whole_to_divided(model: PreTrainedModel, styles: dict[str, str]) -> bool:
    """Whether two names of one parameter would be divided differently."""

    def dimension(parameter: str) -> int | None:
        style = styles.get(parameter) or styles.get(parameter.rpartition(".")[0])
        return None if style is None else STYLES[style].matrix

    ties = model.all_tied_weights_keys.items()
    return any(dimension(target) != dimension(source) for target, source in ties)


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
