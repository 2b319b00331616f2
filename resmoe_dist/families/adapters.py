"""Kinds of experts modules: their shape, their layout, their activation, and how they are called.

Most families of transformers v5 build their experts as one module of fused 3-D weights that says
how it lays them out (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`). A few have a
module that says nothing.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.families.activations import FamilyGate, PlainActivation
from resmoe_dist.families.storage import (
    BIAS,
    EXPERT,
    INPUTS,
    OUTPUT,
    ExpertSite,
    ExpertStorage,
)
from resmoe_dist.families.unsupported import UNSUPPORTED
from resmoe_dist.routing import NO_EXPERT

# run(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]. A dropped copy has
# index NO_EXPERT.
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertsAdapter(ABC):
    """One kind of experts module: what it looks like, and how its block calls it.

    An adapter is made from a module and outlives it. Raises UserError for unsupported experts.
    """

    @classmethod
    @abstractmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    def __init__(self, module: Any) -> None:  # noqa: B027
        """Keep what `call` needs to know of the module."""

    @abstractmethod
    def site(self, name: str, module: Any) -> ExpertSite:
        """Shape and layout of the module called `name`. Raises UserError if it is unsupported."""

    @abstractmethod
    def activation(self, module: Any) -> nn.Module:
        """The activation between the projections. May take the module's weights away."""

    def call(self, run: RunExperts, *arguments: Tensor) -> Tensor:
        """What the module returns for `arguments`, its experts being run by `run`."""
        hidden_states, top_k_index, top_k_weights = arguments
        return run(hidden_states, top_k_index, top_k_weights)


class FusedExperts(ExpertsAdapter):
    """transformers v5's modules of fused weights, called with index and weights."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return hasattr(module, "is_transposed") and isinstance(
            getattr(module, "down_proj", None), Tensor
        )

    def site(self, name: str, module: Any) -> ExpertSite:
        if getattr(module, "has_post_expert_norm", False):
            raise UserError(
                f"{name} ({type(module).__name__}): this family is not supported: "
                f"{UNSUPPORTED['muse_spark']}"
            )
        return _fused_site(
            name,
            module,
            gated=module.has_gate,
            bias=module.has_bias,
            transposed=module.is_transposed,
            interleaved=not module.is_concatenated,
        )

    def activation(self, module: Any) -> nn.Module:
        has_family_gate = type(module)._apply_gate is not _default_apply_gate
        if has_family_gate and module.has_gate:
            return FamilyGate(module, interleaved=not module.is_concatenated)
        return PlainActivation(module.act_fn)


class Step3p7Experts(ExpertsAdapter):
    """Step 3.7's fused weights, which do not say how they are laid out."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Step3p7Experts"

    def site(self, name: str, module: Any) -> ExpertSite:
        return _fused_site(name, module)

    def activation(self, module: Any) -> nn.Module:
        return FamilyGate(module)


class Llama4Experts(ExpertsAdapter):
    """Llama 4's fused weights, called with a copy of all tokens for each expert.

    The router scales an expert's inputs, to zero if it is not selected.
    """

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def __init__(self, module: Any) -> None:
        self.num_experts = module.num_experts

    def site(self, name: str, module: Any) -> ExpertSite:
        return _fused_site(name, module, transposed=True)

    def activation(self, module: Any) -> nn.Module:
        return PlainActivation(module.act_fn)

    def call(self, run: RunExperts, *arguments: Tensor) -> Tensor:
        """One argument [E·T, H]; each row goes to one expert. Rows of zeros give zeros."""
        (scaled,) = arguments
        expert = torch.arange(self.num_experts, device=scaled.device)
        index = expert.repeat_interleave(scaled.shape[0] // self.num_experts).unsqueeze(1)
        selected = scaled.any(-1, keepdim=True)
        index = index.masked_fill(~selected, NO_EXPERT)
        return run(scaled, index, torch.ones_like(index, dtype=scaled.dtype))


class LongcatExperts(ExpertsAdapter):
    """LongCat-Flash's fused weights. Experts beyond the last one in them return their input."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "LongcatFlashExperts" and module.down_proj is not None

    def __init__(self, module: Any) -> None:
        self.num_experts = module.num_routed_experts

    def site(self, name: str, module: Any) -> ExpertSite:
        return replace(_fused_site(name, module), spare=module.zero_expert_num)

    def activation(self, module: Any) -> nn.Module:
        return PlainActivation(module.act_fn)

    def call(self, run: RunExperts, *arguments: Tensor) -> Tensor:
        """Weighted inputs stand in for the experts without weights."""
        hidden_states, index, weights = arguments
        is_identity = index >= self.num_experts
        out = run(hidden_states, index.masked_fill(is_identity, NO_EXPERT), weights)
        share = weights.masked_fill(~is_identity, 0).sum(-1, keepdim=True)
        return out + (hidden_states * share).to(out.dtype)


class DbrxExperts(ExpertsAdapter):
    """DBRX's experts, one below the other in three matrices."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts"

    def site(self, name: str, module: Any) -> ExpertSite:
        storage = ExpertStorage(
            tensors={"gate": f"{name}.mlp.w1", "up": f"{name}.mlp.v1", "down": f"{name}.mlp.w2"},
            fused=True,
            stacked=True,
            output_transposed=True,
        )
        shape = ExpertShape(rows=module.ffn_hidden_size, hidden=module.hidden_size)
        return ExpertSite(name, module.num_experts, shape, storage)

    def activation(self, module: Any) -> nn.Module:
        return PlainActivation(module.mlp.activation_fn)

    def call(self, run: RunExperts, *arguments: Tensor) -> Tensor:
        """hidden_states [B, S, H]; the output has the same shape."""
        hidden_states, top_k_index, top_k_weights = arguments
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return run(tokens, top_k_index, top_k_weights).view_as(hidden_states)


class SwitchExperts(ExpertsAdapter):
    """Switch Transformers' ModuleDict of experts, called with a one-hot mask."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "SwitchTransformersExperts" and hasattr(module, "expert_0")

    def site(self, name: str, module: Any) -> ExpertSite:
        return _separate_site(name, module, "wi", "wo")

    def activation(self, module: Any) -> nn.Module:
        return PlainActivation(module["expert_0"].act)

    def call(self, run: RunExperts, *arguments: Tensor) -> Tensor:
        """The mask [T, 1, E] is all zero for a token over capacity; weights are [T, 1]."""
        hidden_states, selected, routing_weights = arguments
        kept_T1, index_T1 = selected.max(-1)
        index_T1 = index_T1.masked_fill(kept_T1 == 0, NO_EXPERT)
        return run(hidden_states, index_T1, routing_weights)


class NllbExperts(ExpertsAdapter):
    """NLLB-MoE's ModuleDict of experts. Each output is scaled, as dropout would scale it."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "NllbMoeExperts" and hasattr(module, "expert_0")

    def __init__(self, module: Any) -> None:
        self.scale = 1 - module.moe_token_dropout

    def site(self, name: str, module: Any) -> ExpertSite:
        return _separate_site(name, module, "fc1", "fc2", bias=True)

    def activation(self, module: Any) -> nn.Module:
        return PlainActivation(module["expert_0"].act)

    def call(self, run: RunExperts, *arguments: Tensor) -> Tensor:
        """index and weights are [T, E]; most weights are zero."""
        hidden_states, index, weights = arguments
        return run(hidden_states, index.masked_fill(weights == 0, NO_EXPERT), weights * self.scale)


def _fused_site(
    name: str,
    module: Any,
    *,
    gated: bool = True,
    bias: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
) -> ExpertSite:
    """The site of a module with `gate_up_proj` (or `up_proj`) and `down_proj` [E, …]."""
    num_experts, *dims = module.down_proj.shape
    rows, hidden = dims if transposed else reversed(dims)
    tensors = {INPUTS: f"{name}.{'gate_up_proj' if gated else 'up_proj'}"}
    tensors[OUTPUT] = f"{name}.down_proj"
    if bias:
        tensors |= {f"{key}{BIAS}": f"{tensor}_bias" for key, tensor in tensors.items()}
    return ExpertSite(
        name,
        num_experts,
        ExpertShape(rows=rows, hidden=hidden, gated=gated, row_bias=bias, output_bias=bias),
        ExpertStorage(tensors=tensors, fused=True, transposed=transposed, interleaved=interleaved),
    )


def _separate_site(
    name: str, module: Any, input_name: str, output_name: str, *, bias: bool = False
) -> ExpertSite:
    """The site of a ModuleDict of two-layer MLPs, `expert_0` and so on."""
    rows, hidden = getattr(module["expert_0"], input_name).weight.shape
    tensors = {}
    for key, projection in (("in", input_name), ("out", output_name)):
        tensors[key] = f"{name}.expert_{EXPERT}.{projection}.weight"
        if bias:
            tensors[f"{key}{BIAS}"] = f"{name}.expert_{EXPERT}.{projection}.bias"
    count = sum(child.startswith("expert_") for child, _ in module.named_children())
    shape = ExpertShape(rows, hidden, gated=False, row_bias=bias, output_bias=bias)
    return ExpertSite(name, count, shape, ExpertStorage(tensors=tensors, fused=False))


ADAPTERS: tuple[type[ExpertsAdapter], ...] = (
    FusedExperts,
    Step3p7Experts,
    Llama4Experts,
    LongcatExperts,
    DbrxExperts,
    SwitchExperts,
    NllbExperts,
)


def adapter_for(module: nn.Module) -> ExpertsAdapter | None:
    """The adapter of an experts module; None for any other module."""
    found = next((adapter for adapter in ADAPTERS if adapter.recognises(module)), None)
    return None if found is None else found(module)
