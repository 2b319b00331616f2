"""Where a model keeps its experts, and how it calls them, read off the model itself.

In transformers v5 some sixty families build their experts as one module of fused 3-D weights that
says how it lays them out (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`). Switch
Transformers keeps a ModuleDict of small MLPs. One adapter per kind of module knows its shape, its
activation and its call. A model on the meta device costs no memory and is enough to find them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.families.activations import FamilyGate, PlainActivation
from resmoe_dist.routing import NO_EXPERT


@dataclass(frozen=True)
class ExpertSite:
    """One module of a model that holds the experts of one layer.

    module: its dotted name. transposed and interleaved: how its *fused* tensors are laid out
    ([in, out] rather than [out, in]; gate and up rows alternating rather than one after the other).
    """

    module: str
    num_experts: int
    shape: ExpertShape
    transposed: bool = False
    interleaved: bool = False


class ExpertsAdapter(ABC):
    """One kind of experts module: what it looks like, and how its block calls it."""

    @classmethod
    @abstractmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    @classmethod
    @abstractmethod
    def site(cls, name: str, module: Any) -> ExpertSite:
        """Shape and layout of the module called `name`. Raises UserError if it is unsupported."""

    @classmethod
    @abstractmethod
    def activation(cls, module: Any) -> nn.Module:
        """The activation between the projections. May take the module's weights away."""

    @classmethod
    @abstractmethod
    def routing(cls, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The call's arguments as hidden states [T, H], top_k_index [T, K], top_k_weights [T, K].

        A dropped copy gets index NO_EXPERT.
        """


class FusedExperts(ExpertsAdapter):
    """transformers v5's modules of fused weights, called with index and weights."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return hasattr(module, "is_transposed") and isinstance(
            getattr(module, "down_proj", None), Tensor
        )

    @classmethod
    def site(cls, name: str, module: Any) -> ExpertSite:
        if getattr(module, "has_post_expert_norm", False):
            raise UserError(
                f"{name} ({type(module).__name__}) normalises each expert's output, which a sum of "
                "rows cannot express; this family is not supported"
            )
        num_experts, *shape = module.down_proj.shape
        rows, hidden = shape if module.is_transposed else reversed(shape)
        return ExpertSite(
            name,
            num_experts,
            ExpertShape(
                rows=rows,
                hidden=hidden,
                gated=module.has_gate,
                row_bias=module.has_bias,
                output_bias=module.has_bias,
            ),
            transposed=module.is_transposed,
            interleaved=not module.is_concatenated,
        )

    @classmethod
    def activation(cls, module: Any) -> nn.Module:
        has_family_gate = type(module)._apply_gate is not _default_apply_gate
        if has_family_gate and module.has_gate:
            return FamilyGate(module)
        return PlainActivation(module.act_fn)

    @classmethod
    def routing(cls, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states, top_k_index, top_k_weights = arguments
        return hidden_states, top_k_index, top_k_weights


class SwitchExperts(ExpertsAdapter):
    """Switch Transformers' ModuleDict of experts, called with a one-hot mask."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleDict) and "expert_0" in module

    @classmethod
    def site(cls, name: str, module: Any) -> ExpertSite:
        rows, hidden = module["expert_0"].wi.weight.shape
        return ExpertSite(name, len(module), ExpertShape(rows=rows, hidden=hidden, gated=False))

    @classmethod
    def activation(cls, module: Any) -> nn.Module:
        return PlainActivation(module["expert_0"].act)

    @classmethod
    def routing(cls, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # selected [T, 1, E] is all zero for a token over capacity; weights are [T, 1].
        hidden_states, selected, routing_weights = arguments
        kept_T1, index_T1 = selected.max(-1)
        return hidden_states, index_T1.masked_fill(kept_T1 == 0, NO_EXPERT), routing_weights


ADAPTERS: tuple[type[ExpertsAdapter], ...] = (FusedExperts, SwitchExperts)


def adapter_for(module: nn.Module) -> type[ExpertsAdapter] | None:
    """The adapter of an experts module; None for any other module."""
    return next((adapter for adapter in ADAPTERS if adapter.recognises(module)), None)


def find_expert_sites(model: nn.Module) -> list[ExpertSite]:
    """All expert modules of a model, in the order of its modules.

    Raises UserError for experts whose layout is not supported.
    """
    return [
        adapter.site(name, module)
        for name, module in model.named_modules()
        if (adapter := adapter_for(module)) is not None
    ]


def replace_experts(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the experts called `name`, before weights are loaded."""
    model.set_submodule(name, module)
    # transformers initialises, block by block, what no checkpoint file filled, and would look for
    # the original experts.
    block = model.get_submodule(name.rpartition(".")[0])
    for part in (block, *module.modules()):
        part._is_hf_initialized = True  # type: ignore[assignment]
