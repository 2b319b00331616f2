"""What a backend does, and which one a layer gets.

triton      CUDA devices with Triton installed; pruned residuals, dense centres
cpu         CPUs, bfloat16 or float32; pruned residuals, dense centres (C++, built on first use)
reference   everything else: plain PyTorch, any codec; it defines what the others compute
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from resmoe_dist.kernels.layer import LayerWeights
from resmoe_dist.routing import RoutedTokens


class Backend(ABC):
    """Runs the experts of one layer.

    Made once when a layer is loaded, and again when its weights move to another device or dtype.
    Whatever can be prepared from the weights alone is prepared here, not per token.
    """

    name: ClassVar[str]

    def __init__(self, layer: LayerWeights) -> None:
        self.layer = layer
        # Identifies these weights in caches, without keeping them alive.
        self.key = object()

    @property
    def prepared_bytes(self) -> int:
        """Bytes of tensors that were decoded in preparation, beside the layer's own."""
        return 0

    @classmethod
    @abstractmethod
    def supports(cls, layer: LayerWeights) -> bool:
        """Whether this backend can run the layer on this machine."""

    @abstractmethod
    def mlp(self, routed: RoutedTokens, *, share_center: bool) -> Tensor:
        """For each token the weighted sum of its copies' expert outputs: [R, H] in float32.

        With C = [C_in | C_out], residuals R_k alike, and weights g_k over the experts k of a token:

            h_k = act((C_in + R_k,in) x)
            y   = Σ g_k (C_out + R_k,out) h_k

        share_center=False adds centre and residual inside the product ("tiled"). share_center=True
        multiplies a centre once per token, whichever of its experts the token goes to ("shared"):

            h_k = act(C_in x + R_k,in x)
            y   = C_out (Σ g_k h_k) + Σ g_k R_k,out h_k

        Output biases are not included. Activations are rounded to the dtype of x once.
        """

    @abstractmethod
    def restore(
        self, expert: int, out_RC: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        """Write C + R_k of a local expert into `out_RC`, rounded once to its dtype.

        As many rows and columns as `out_RC` has, from the given ones on.
        """


def _triton(layer: LayerWeights) -> type[Backend] | None:
    if layer.device.type != "cuda":
        return None
    try:
        from resmoe_dist.kernels.triton.backend import TritonBackend
    except ImportError:
        return None
    return TritonBackend


def _cpu(layer: LayerWeights) -> type[Backend] | None:
    from resmoe_dist.kernels.cpu.backend import CpuBackend

    return CpuBackend


def _reference(layer: LayerWeights) -> type[Backend] | None:
    from resmoe_dist.kernels.reference import ReferenceBackend

    return ReferenceBackend


# In order of preference. Functions, so that a backend is imported only where it may run.
BACKENDS: dict[str, Callable[[LayerWeights], type[Backend] | None]] = {
    "triton": _triton,
    "cpu": _cpu,
    "reference": _reference,
}


def backend_for(layer: LayerWeights) -> Backend:
    """The fastest backend that supports a layer. RESMOE_KERNELS=reference forces the reference."""
    names = ["reference"] if os.environ.get("RESMOE_KERNELS") == "reference" else list(BACKENDS)
    for name in names:
        backend = BACKENDS[name](layer)
        if backend is not None and backend.supports(layer):
            return backend(layer)
    raise AssertionError("the reference supports every layer")
