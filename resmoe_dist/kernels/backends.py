"""Which backend runs a layer.

triton             CUDA devices with Triton installed; pruned residuals, dense centres
triton-quantized   the same for quantised residuals, with quantised or dense centres
cpu                CPUs, bfloat16 or float32; pruned residuals, dense centres (C++, built on first
                   use)
quantized          the same for quantised residuals and centres
reference          everything else: plain PyTorch, any codec; it defines what the others compute
"""

from __future__ import annotations

import os
from collections.abc import Callable

from resmoe_dist.kernels.interface import Backend
from resmoe_dist.kernels.layer import LayerWeights


def _triton(layer: LayerWeights) -> type[Backend] | None:
    if layer.device.type != "cuda":
        return None
    try:
        from resmoe_dist.kernels.triton.backend import TritonBackend
    except ImportError:
        return None
    return TritonBackend


def _triton_quantized(layer: LayerWeights) -> type[Backend] | None:
    if layer.device.type != "cuda":
        return None
    try:
        from resmoe_dist.kernels.triton.quantized_backend import QuantizedTritonBackend
    except ImportError:
        return None
    return QuantizedTritonBackend


def _cpu(layer: LayerWeights) -> type[Backend] | None:
    from resmoe_dist.kernels.cpu.backend import CpuBackend

    return CpuBackend


def _quantized(layer: LayerWeights) -> type[Backend] | None:
    from resmoe_dist.kernels.cpu.quantized_backend import QuantizedCpuBackend

    return QuantizedCpuBackend


def _reference(layer: LayerWeights) -> type[Backend] | None:
    from resmoe_dist.kernels.reference import ReferenceBackend

    return ReferenceBackend


# In order of preference. Functions, so that a backend is imported only where it may run.
BACKENDS: dict[str, Callable[[LayerWeights], type[Backend] | None]] = {
    "triton": _triton,
    "triton-quantized": _triton_quantized,
    "cpu": _cpu,
    "quantized": _quantized,
    "reference": _reference,
}


def backend_for(layer: LayerWeights) -> Backend:
    """The fastest backend that supports a layer. RESMOE_KERNELS=reference forces the reference."""
    return fastest_backend(layer)(layer)


def fastest_backend(layer: LayerWeights) -> type[Backend]:
    """The class of `backend_for`, which prepares the layer's weights."""
    names = ["reference"] if os.environ.get("RESMOE_KERNELS") == "reference" else list(BACKENDS)
    for name in names:
        backend = BACKENDS[name](layer)
        if backend is not None and backend.supports(layer):
            return backend
    raise AssertionError("the reference supports every layer")
