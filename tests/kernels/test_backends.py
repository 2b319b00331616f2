"""Which backend is chosen for a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resmoe_dist.codecs.empty import EmptyMatrix
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.kernels.backends import fastest_backend
from tests.kernels.problems import Case
from tests.kernels.quantized_problems import (
    Coding,
    QuantizedCase,
    QuantizedExpert,
    with_dense_centers,
)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are taken for ones on a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("RESMOE_KERNELS", raising=False)
    monkeypatch.setattr(LayerWeights, "device", torch.device("cuda"))


def quantized(*groups: int | None, dtype: torch.dtype = torch.bfloat16) -> LayerWeights:
    experts = tuple(QuantizedExpert(Coding(group=group)) for group in groups)
    return QuantizedCase(rows=2, hidden=64, experts=experts).build(dtype).layer


def test_a_gpu_runs_quantised_layers_in_triton(on_cuda):
    case = QuantizedCase(rows=2, hidden=64)
    without_centers = replace(case, experts=(QuantizedExpert(center=None),))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        problem = case.build(dtype)
        assert fastest_backend(problem.layer).name == "triton-quantized"
        assert fastest_backend(with_dense_centers(problem).layer).name == "triton-quantized"
        assert fastest_backend(without_centers.build(dtype).layer).name == "triton-quantized"


def test_a_gpu_runs_pruned_layers_in_triton(on_cuda):
    assert fastest_backend(Case(rows=2, hidden=8).build(torch.bfloat16).layer).name == "triton"


@pytest.mark.parametrize(
    "layer",
    [
        quantized(20),
        quantized(64, dtype=torch.float64),
        replace(
            quantized(64),
            centers=(EmptyMatrix((2, 192), {}, torch.bfloat16),),
        ),
    ],
    ids=["group of 20", "float64", "empty centre"],
)
def test_a_gpu_leaves_other_layers_to_the_reference(on_cuda, layer):
    assert fastest_backend(layer).name == "reference"


def test_rotated_and_other_matrices_do_not_mix(on_cuda):
    layer = quantized(64, 64)
    other = QuantizedCase(rows=2, hidden=64, rotated=False).build(torch.bfloat16).layer
    mixed = replace(layer, residuals=(layer.residuals[0], other.residuals[0]))

    assert fastest_backend(mixed).name == "reference"


def test_the_environment_forces_the_reference(on_cuda, monkeypatch):
    monkeypatch.setenv("RESMOE_KERNELS", "reference")

    assert fastest_backend(quantized(64)).name == "reference"
