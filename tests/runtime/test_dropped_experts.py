"""Serving checkpoints without some experts or rows: as the smaller model made by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from resmoe_dist import ResMoE, load_model
from tests.checkpoints.damage import mistake
from tests.checkpoints.pruned_by_hand import OVERRIDES, without_experts, without_rows
from tests.checkpoints.regrouping import regroup
from tests.models import (
    FAMILIES,
    compress,
    dense_model,
    logits_of,
    relative_difference,
    save_family,
)
from tests.ranks import run_on_ranks

TOLERANCE = 1e-4  # relative, float32
KEPT = [0, 2, 3, 5]
EXPERT_MAP = [0, -1, 1, 2, -1, 3]
KEPT_ROWS = [0, 1, 2, 4, 5, 7, 8]
GRIDS = [(2, 1), (2, 2)]


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """dropped(family): folders `source`, exact `compressed`, and `r` with four of six experts."""
    folders = {}

    def make(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            save_family(FAMILIES[name], folder / "source", **OVERRIDES[name])
            compress(folder / "source", folder / "compressed", align="none", keep=1.0)
            groups = [[0, 1], [2, 3]]
            regroup(folder / "compressed", folder / "r", groups, expert_map=EXPERT_MAP)
            without_experts(folder / "source", folder / "expected", KEPT)
            folders[name] = folder
        return folders[name]

    return make


def _served(folder):
    return logits_of(load_model(folder))


@pytest.mark.parametrize("name", OVERRIDES)
def test_dropped_experts_are_served_as_the_model_without_them(dropped, name):
    expected = logits_of(dense_model(dropped(name) / "expected"))

    assert relative_difference(_served(dropped(name) / "r"), expected) <= TOLERANCE


def test_plain_from_pretrained_serves_it_too(dropped):
    expected = logits_of(dense_model(dropped("mixtral") / "expected"))

    model = AutoModelForCausalLM.from_pretrained(dropped("mixtral") / "r")

    assert relative_difference(logits_of(model), expected) <= TOLERANCE


def _logits_on_grids(folders, grids):
    return [[logits_of(load_model(each, ep=ep, tp=tp)) for ep, tp in grids] for each in folders]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_serves_the_same(dropped, grid):
    expected = [logits_of(dense_model(dropped(name) / "expected")) for name in OVERRIDES]
    folders = [dropped(name) / "r" for name in OVERRIDES]
    for found in run_on_ranks(grid[0] * grid[1], _logits_on_grids, folders, [grid]):
        for name, (mine,), want in zip(OVERRIDES, found, expected, strict=True):
            assert relative_difference(mine, want) <= TOLERANCE, name


def test_layers_may_keep_different_numbers(dropped, tmp_path):
    """Layer 1 keeps four of six experts, layer 0 all: the router of layer 1 is masked by hand."""
    folder = dropped("mixtral")
    groups = [[0, 1], [2, 3]]
    regroup(folder / "compressed", tmp_path / "r", groups, expert_map=EXPERT_MAP, only_layers=[1])
    model = dense_model(folder / "source")
    gate = model.model.layers[1].mlp.gate

    def route(x):
        x_TH = x.reshape(-1, x.shape[-1])
        logits_TE = F.linear(x_TH, gate.weight)
        logits_TE[:, [1, 4]] = float("-inf")
        weights_TK, index_TK = logits_TE.softmax(-1).topk(2)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), index_TK

    gate.forward = route

    found = _served(tmp_path / "r")

    assert relative_difference(found, logits_of(model)) <= TOLERANCE
    gate.forward = type(gate).forward.__get__(gate)
    assert relative_difference(found, logits_of(model)) > 0.01


def test_a_layer_of_its_own_chooses_among_the_kept_experts(dropped):
    layer = ResMoE.from_checkpoint(dropped("mixtral") / "r", 0, k=2)

    assert layer.deepspeed_moe.gate.wg.weight.shape == (4, 20)
    assert layer.num_experts == 4


def test_experts_are_dropped_from_groups_evenly_or_not_at_all(dropped, tmp_path):
    overrides = OVERRIDES["deepseek_v3"] | {"n_group": 2, "topk_group": 1}
    save_family(FAMILIES["deepseek_v3"], tmp_path / "s", **overrides)
    compress(tmp_path / "s", tmp_path / "c", keep=1.0)
    uneven = [0, 1, 2, -1, 3, -1]
    regroup(tmp_path / "c", tmp_path / "r", [[0, 1, 2, 3]], expert_map=uneven)
    with mistake(r"2 groups of experts, which keep \[3, 1\]"):
        load_model(tmp_path / "r")


def test_fewer_experts_than_a_token_needs_are_refused(dropped, tmp_path):
    folder = dropped("mixtral") / "compressed"
    regroup(folder, tmp_path / "r", [[0]], expert_map=[-1, -1, 0, -1, -1, -1])
    with mistake("1 of 6 experts are kept, and each token needs 2"):
        load_model(tmp_path / "r")


@pytest.mark.parametrize("name", OVERRIDES)
def test_fewer_rows_are_served_as_if_the_others_added_nothing(dropped, tmp_path, name):
    folder = dropped(name)
    regroup(folder / "compressed", tmp_path / "r", [list(range(6))], kept_rows=KEPT_ROWS)
    zeroed = without_rows(folder / "source", tmp_path / "expected", KEPT_ROWS, zero=True)

    expected = logits_of(dense_model(zeroed))

    assert relative_difference(_served(tmp_path / "r"), expected) <= TOLERANCE
    source = logits_of(dense_model(folder / "source"))
    assert relative_difference(expected, source) > 0.01


@torch.no_grad()
def test_no_token_goes_to_a_dropped_expert(dropped):
    """Every token has as many experts as in the source, all of them kept."""
    model = load_model(dropped("mixtral") / "r")
    called = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, arguments: called.append(arguments[1]))

    logits_of(model)

    (index_TK,) = called
    assert index_TK.shape[1] == 2
    assert (index_TK >= 0).all()
    assert (index_TK < 4).all()
