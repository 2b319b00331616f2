"""The non-linearity between an expert's inputs and its output, as its family defines it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from resmoe_dist.families.sites import is_switch_experts


class Activation(Protocol):
    """Takes the outputs [R, I] of the input projections (gate, up; or in), gives h [R, I]."""

    def __call__(self, *inputs: Tensor) -> Tensor: ...


# Activations that kernels have (see `ops.reference`), by what transformers makes of their names.
_KERNELS = {
    type(ACT2FN[name]): kernel
    for name, kernel in (
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
    )
}


class PlainActivation(nn.Module):
    """act(gate) · up for gated experts, act(in) for two-layer ones.

    act: a transformers activation name (`silu`, `relu` …) or a callable.
    """

    def __init__(self, act: str | nn.Module) -> None:
        super().__init__()
        self.act = ACT2FN[act] if isinstance(act, str) else act

    @property
    def kernel(self) -> str | None:
        """The name of it among the kernels', if it is one of them."""
        return _KERNELS.get(type(self.act))

    def forward(self, *inputs: Tensor) -> Tensor:
        h = self.act(inputs[0])
        return h if len(inputs) == 1 else h * inputs[1]


class FamilyGate(nn.Module):
    """A family's own `_apply_gate`, on the module it came with, stripped of its weights."""

    kernel = None

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        experts._parameters.clear()
        self.experts = experts

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.experts.is_concatenated:
            return self.experts._apply_gate(torch.cat([gate, up], -1))
        return self.experts._apply_gate(torch.stack([gate, up], -1).flatten(-2))


def activation_of(experts: nn.Module) -> nn.Module:
    """The activation of a transformers experts module. The module's weights may be taken away."""
    if is_switch_experts(experts):
        return PlainActivation(experts["expert_0"].act)
    own_gate = type(experts)._apply_gate is not _default_apply_gate
    return FamilyGate(experts) if own_gate and experts.has_gate else PlainActivation(experts.act_fn)
