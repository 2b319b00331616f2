"""The function between an expert's input and output projections, as its family defines it.

Legend: N routed copies, S rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

# Names of the activations that fused kernels support (`kernels.reference.FUSED_ACTIVATIONS`), by
# transformers' class.
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
        """Its name among the fused kernels' activations, or None."""
        return _KERNELS.get(type(self.act))

    def forward(self, *inputs: Tensor) -> Tensor:
        h = self.act(inputs[0])
        return h if len(inputs) == 1 else h * inputs[1]


class FamilyGate(nn.Module):
    """A family's own `_apply_gate`, on the module it came with, stripped of its weights.

    interleaved: it expects gate and up in turns, not one after the other.
    """

    kernel = None
    experts: Any

    def __init__(self, experts: nn.Module, *, interleaved: bool = False) -> None:
        super().__init__()
        experts._parameters.clear()
        self.experts, self.interleaved = experts, interleaved

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.interleaved:
            return self.experts._apply_gate(torch.stack([gate, up], -1).flatten(-2))
        return self.experts._apply_gate(torch.cat([gate, up], -1))
