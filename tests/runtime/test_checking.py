"""`--check` on real ranks: what is wrong ends a forward pass, and the message says where."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from resmoe_dist.errors import FailedCheckError, UserError
from resmoe_dist.parallel.failures import describe, exit_code
from resmoe_dist.parallel.topology import SINGLE_PROCESS, build_topology
from resmoe_dist.runtime.checking import check_steps, routing_digest
from resmoe_dist.runtime.loading import load_model
from tests.models import dense_model
from tests.ranks import run_on_ranks


def _route_differently(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.gate.weight[0] += 0.5


def _damage_experts(model: PreTrainedModel) -> None:
    for residual in model.model.layers[0].mlp.experts.experts.layer.residuals:
        residual.values.fill_(math.inf)


def _damage_norm(model: PreTrainedModel) -> None:
    model.model.layers[1].post_attention_layernorm.weight.fill_(math.nan)


# What happens, and on which rank.
FAULTS = {
    "nothing": (0, lambda model: None),
    "routing": (3, _route_differently),
    "experts": (3, _damage_experts),
    "input": (1, _damage_norm),
}
EXPECTED = {
    "routing": "rank 3 routes differently from rank {usual} of its lane in "
    "model.layers.1.mlp.experts, step 2",
    "experts": "rank 3: the experts' output is not finite in model.layers.0.mlp.experts, step 2",
    "input": "rank 1: the layer's input is not finite in model.layers.1.mlp.experts, step 2",
}


@torch.no_grad()
def _said(folder: Path, tp: int, lanes: int) -> dict[str, str]:
    """On each rank, the message about each fault; it happens after the first step."""
    topology = build_topology(2, tp, lanes)
    # A batch per lane, with padding.
    ids_BS = torch.tensor([[0, 0, 5, 6, 7 + topology.lane], [4, 5, 6, 7, 8]])
    found = {}
    for name, (rank, fault) in FAULTS.items():
        model = load_model(folder, topology=topology)
        check_steps(model, topology)
        model(input_ids=ids_BS, attention_mask=(ids_BS > 0).long())
        if topology.rank == rank:
            fault(model)
        try:
            model(input_ids=ids_BS, attention_mask=(ids_BS > 0).long())
        except FailedCheckError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize(
    ("tp", "lanes", "usual"),
    [(2, 1, 0), (2, 2, 2), (1, 1, 0)],
    ids=["1 lane", "2 lanes", "1 lane of 2 replicas"],
)
def test_every_rank_names_the_rank_and_layer_that_is_wrong(pristine, tp, lanes, usual):
    expected = {name: text.format(usual=usual) for name, text in EXPECTED.items()}

    assert run_on_ranks(4, _said, pristine, tp, lanes) == 4 * [expected]


def test_a_single_process_checks_that_values_are_finite(pristine):
    model = load_model(pristine)
    check_steps(model, SINGLE_PROCESS)
    with torch.no_grad():
        _damage_experts(model)
        with pytest.raises(FailedCheckError, match="rank 0: the experts' output is not finite"):
            model(input_ids=torch.tensor([[5, 6, 7]]))


def test_a_dense_model_cannot_be_checked(family_folder):
    with pytest.raises(UserError, match="no compressed experts"):
        check_steps(dense_model(family_folder("mixtral")), SINGLE_PROCESS)


def test_a_failed_check_is_one_line_and_exit_code_1():
    error = FailedCheckError("rank 1: something")

    assert describe(error, 3) == "error: rank 1: something"
    assert exit_code(error) == 1


def _one_changed(change: Callable[[torch.Tensor, torch.Tensor], object]) -> bool:
    index_TK, weights_TK = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    before = routing_digest(index_TK, weights_TK)
    change(index_TK, weights_TK)
    return bool(before != routing_digest(index_TK, weights_TK))


def test_a_digest_changes_with_every_change():
    assert not _one_changed(lambda index, weights: None)
    assert _one_changed(lambda index, weights: index[1, 1].fill_(3))
    assert _one_changed(lambda index, weights: weights[1, 1].mul_(1 + 2**-20))
    # The same pairs, for other tokens.
    assert _one_changed(lambda index, weights: (index.copy_(index.flip(0)), weights.flip(0)))
    # The same experts with each other's weights.
    assert _one_changed(lambda index, weights: weights[1].copy_(weights[1].flip(0)))
