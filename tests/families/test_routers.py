"""Recorded router logits are those that a router's own weight gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resmoe_dist.families.models import meta_model
from resmoe_dist.families.routers import RouterOutput, router_outputs
from resmoe_dist.families.sites import find_expert_sites
from tests.all_families import tiny_model
from tests.models import dense_model, random_sequences

# Name of the router's weight, and bias if any, in the block around the experts.
ROUTERS = {
    "mixtral": ("gate.weight", None),
    "qwen3_moe": ("gate.weight", None),
    "olmoe": ("gate.weight", None),
    "deepseek_v3": ("gate.weight", None),
    "gpt_oss": ("router.weight", "router.bias"),
    "switch": ("router.classifier.weight", None),
}


def _run(model: nn.Module) -> None:
    ids = torch.tensor(random_sequences(7, 7))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, **more)


@pytest.mark.parametrize("family", ROUTERS)
def test_logits_are_the_routers_weight_times_the_experts_input(family_folder, family):
    model = dense_model(family_folder(family))
    sites = find_expert_sites(model)
    found: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for site, router in zip(sites, router_outputs(model, sites), strict=True):
        assert router is not None
        router.module.register_forward_hook(
            lambda _, args, output, site=site, router=router: found.update(
                {site.module: router.logits(output, site.num_experts)}
            )
        )
        model.get_submodule(site.module).register_forward_pre_hook(
            lambda _, args, site=site: inputs.update({site.module: args[0].clone()})
        )

    _run(model)

    weight_name, bias_name = ROUTERS[family]
    parameters = dict(model.named_parameters())
    for site in sites:
        block = site.module.rpartition(".")[0]
        x_TH = inputs[site.module].reshape(-1, site.shape.hidden)
        expected_TE = x_TH @ parameters[f"{block}.{weight_name}"].T
        if bias_name is not None:
            expected_TE = expected_TE + parameters[f"{block}.{bias_name}"]
        assert found[site.module].shape == (len(x_TH), site.num_experts)
        torch.testing.assert_close(found[site.module], expected_TE, rtol=1e-5, atol=1e-5)


def test_model_whose_routers_are_not_recorded_has_no_logits(family_folder, monkeypatch):
    model = dense_model(family_folder("mixtral"))
    kinds = {type(part) for part in model.modules() if hasattr(part, "_can_record_outputs")}
    for kind in kinds:
        monkeypatch.setattr(kind, "_can_record_outputs", {}, raising=False)

    sites = find_expert_sites(model)

    assert router_outputs(model, sites) == [None] * len(sites)


def test_choices_beyond_the_experts_are_left_out():
    scores = torch.arange(36.0).reshape(2, 3, 6)

    found = RouterOutput(nn.Identity(), 1).logits((None, scores), 4)

    assert found.tolist() == [[6.0 * t + k for k in range(4)] for t in range(6)]


def _weights_of(model: nn.Module) -> set[str | None]:
    """The names of the weights that make logits, in their blocks; None for other routers."""
    sites = find_expert_sites(model)
    modules = {module: name for name, module in model.named_modules()}
    found = set()
    for site, router in zip(sites, router_outputs(model, sites), strict=True):
        assert router is not None
        weight = router.linear_weight(site.num_experts)
        block = site.module.rpartition(".")[0]
        name = f"{modules[router.module]}.{weight}".removeprefix(f"{block}.")
        found.add(None if weight is None else name)
    return found


@pytest.mark.parametrize("family", ROUTERS)
def test_the_weight_of_a_product_is_found(family_folder, family):
    # On the meta device, as before a run.
    model = meta_model(dense_model(family_folder(family)).config)

    assert _weights_of(model) == {ROUTERS[family][0]}


@pytest.mark.parametrize(
    ("family", "weight"),
    [
        ("lfm2_moe", "gate.weight"),  # its block gives the router a bias
        ("llama4", "router.weight"),
        ("nllb_moe", "router.classifier.weight"),
        ("gemma4", None),  # normalises the hidden states first
        ("longcat_flash", None),  # also chooses among experts without weights
    ],
)
def test_a_router_that_computes_more_than_a_product_has_no_such_weight(family, weight):
    assert _weights_of(tiny_model(family)) == {weight}


class _Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        logits = x.flatten(0, -2) @ self.weight.T
        return logits + 0.01 * logits.square(), None


def test_a_slightly_bent_product_is_no_product():
    assert RouterOutput(_Bent(), 0).linear_weight(4) is None
