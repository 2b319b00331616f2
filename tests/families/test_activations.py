"""Which activations the fused kernels support, and that they compute what transformers does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.kernels.cpu.backend import CpuBackend
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.runtime.execution import Product
from tests.models import relative_difference
from tests.runtime.random_layers import GROUPINGS, SHORT, make_experts, naive, random_tokens

# As in test_execution. Any two of the activations differ by more.
TOLERANCE = 1e-5
KERNELS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
OTHERS = ["gelu", "gelu_10", "quick_gelu", "relu2", "relu6", "mish", "tanh"]
SHAPES = {"gated": SHORT, "two-layer": replace(SHORT, gated=False)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
shared_or_not = pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])


def is_fused(experts) -> bool:
    """Whether a layer runs in one fused kernel."""
    if not load_kernels():
        pytest.skip("without kernels nothing is fused")
    return isinstance(experts.backend, CpuBackend) and experts.backend.is_fused


@pytest.mark.parametrize("name", KERNELS)
def test_every_name_of_a_fused_activation_is_known(name):
    assert PlainActivation(name).kernel == KERNELS[name]
    assert PlainActivation(ACT2FN[name]).kernel == KERNELS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_have_no_kernel(name):
    assert PlainActivation(name).kernel is None


class CustomSilu(nn.SiLU):
    """A subclass may compute anything."""


def test_a_subclass_has_no_kernel():
    assert PlainActivation(CustomSilu()).kernel is None


@shared_or_not
@every_shape
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", [*KERNELS, *OTHERS])
def test_a_layer_computes_the_activation_of_transformers(name, grouping, shape, share_center):
    experts = make_experts(
        shape, GROUPINGS[grouping], execution=Product(share_center=share_center), act=name
    )
    # Few and many copies per expert use different kernels.
    for count in (5, 40):
        routed = random_tokens(count)

        expected = naive(experts, routed, ACT2FN[name])
        assert relative_difference(experts(routed).double(), expected) <= TOLERANCE


@every_shape
@pytest.mark.parametrize("name", KERNELS)
def test_supported_activations_are_fused(name, shape):
    assert is_fused(make_experts(shape, act=name))


def test_other_activations_are_not_fused():
    assert not is_fused(make_experts(act="gelu"))


@shared_or_not
@every_shape
def test_row_biases_are_added_before_the_activation_and_not_fused(shape, share_center):
    experts = make_experts(
        replace(shape, row_bias=True), execution=Product(share_center=share_center)
    )
    routed = random_tokens(23)

    found = experts(routed)

    assert not is_fused(experts)
    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE


@shared_or_not
def test_an_output_bias_is_added_to_a_fused_result(share_center):
    experts = make_experts(
        replace(SHORT, output_bias=True), execution=Product(share_center=share_center)
    )
    routed = random_tokens(23)

    found = experts(routed)

    assert is_fused(experts)
    assert relative_difference(found.double(), naive(experts, routed)) <= TOLERANCE


@shared_or_not
def test_half_precision_runs_in_the_reference(share_center):
    experts = make_experts(execution=Product(share_center=share_center), dtype=torch.float16)
    routed = random_tokens(23, torch.float16)

    found = experts(routed)

    assert not is_fused(experts)
    assert relative_difference(found.double(), naive(experts, routed)) <= 2**-9
