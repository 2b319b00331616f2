"""Which activations the kernels for whole MLPs take, and that these are what transformers has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from resmoe_dist.codecs import PrunedResidual
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.kernels.cpu.build import load_kernels
from resmoe_dist.runtime.execution import Execution
from tests.models import relative_difference
from tests.runtime.random_layers import GROUPINGS, SHORT, make_experts, naive, routed

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
every_mode = pytest.mark.parametrize("mode", ["shared", "tiled"])


@pytest.fixture
def fused(monkeypatch) -> list[str]:
    """The activations that `mlp` of `pruned` was asked for."""
    if not load_kernels():
        pytest.skip("without kernels nothing is fused")
    asked, original = [], PrunedResidual.mlp

    def spy(*arguments) -> Tensor:
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(PrunedResidual, "mlp", spy)
    return asked


@pytest.mark.parametrize("name", KERNELS)
def test_an_activation_that_kernels_have_is_known_by_every_name_of_it(name):
    assert PlainActivation(name).kernel == KERNELS[name]
    assert PlainActivation(ACT2FN[name]).kernel == KERNELS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_an_activation_that_kernels_lack_is_none_of_theirs(name):
    assert PlainActivation(name).kernel is None


class OwnSilu(nn.SiLU):
    """Something else, for all one knows."""


def test_a_module_of_ones_own_is_none_of_the_kernels():
    assert PlainActivation(OwnSilu()).kernel is None


@every_mode
@every_shape
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", [*KERNELS, *OTHERS])
def test_a_layer_has_the_activation_that_transformers_has(name, grouping, shape, mode):
    experts = make_experts(shape, GROUPINGS[grouping], execution=Execution(mode), act=name)
    # Several copies of an expert, and many.
    for count in (5, 40):
        tokens = routed(count)

        expected = naive(experts, tokens, ACT2FN[name])
        assert relative_difference(experts(tokens).double(), expected) <= TOLERANCE


@every_mode
@every_shape
@pytest.mark.parametrize("name", KERNELS)
def test_an_activation_that_kernels_have_is_run_by_one(fused, name, shape, mode):
    make_experts(shape, execution=Execution(mode), act=name)(routed(9))

    assert fused == [KERNELS[name]]


@every_mode
def test_an_activation_that_kernels_lack_is_run_between_two_products(fused, mode):
    make_experts(execution=Execution(mode), act="gelu")(routed(9))

    assert fused == []


@every_mode
@every_shape
def test_row_biases_are_added_before_the_activation_which_no_kernel_does(fused, shape, mode):
    experts = make_experts(replace(shape, row_bias=True), execution=Execution(mode))
    tokens = routed(23)

    found = experts(tokens)

    assert fused == []
    assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE


@every_mode
def test_an_output_bias_is_added_to_what_a_kernel_gives(fused, mode):
    experts = make_experts(replace(SHORT, output_bias=True), execution=Execution(mode))
    tokens = routed(23)

    found = experts(tokens)

    assert fused == ["silu"]
    assert relative_difference(found.double(), naive(experts, tokens)) <= TOLERANCE


@every_mode
def test_half_precision_has_no_kernels_and_is_run_all_the_same(fused, mode):
    experts = make_experts(execution=Execution(mode), dtype=torch.float16)
    tokens = routed(23, torch.float16)

    found = experts(tokens)

    assert fused == []
    assert relative_difference(found.double(), naive(experts, tokens)) <= 2**-9
