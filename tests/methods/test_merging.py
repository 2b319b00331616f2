"""Methods that merge or drop experts, on four small experts worked out by hand.

Experts have two neurons and one hidden dimension: each row is (weight in, weight out).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.methods import METHODS, EncodedGroup, MethodSpec, SourceGroup, method_of
from resmoe_dist.methods.merged import dominant_per_layer

SHAPE = ExpertShape(rows=2, hidden=1, gated=False)
EXPERTS = torch.tensor(
    [
        [[4.0, 0.0], [0.0, 2.0]],
        [[0.0, 6.0], [8.0, 0.0]],
        [[5.0, 1.0], [1.0, 0.0]],
        [[1.0, 1.0], [3.0, 0.0]],
    ]
)
# Experts 0 and 3 are used most; 1 is routed like 0, and 2 like 3.
TOKENS = [6, 2, 1, 3]
LOGITS = [[1.0, 0.9, 0.2, 0.0], [0.0, 0.1, 1.0, 1.0]]


def _group(tokens: list[int] = TOKENS, max_stored: int = 2, **changes: Any) -> SourceGroup:
    samples = LayerSamples(
        inputs_TH=torch.tensor([[0.5], [1.5]]),
        index_TK=torch.tensor([[0], [3]]),
        weights_TK=torch.ones(2, 1),
        logits_TE=torch.tensor(LOGITS),
    )
    activations = LayerActivations(
        input_rms_H=torch.ones(1),
        neuron_rms_EI=torch.ones(4, 2),
        tokens_E=torch.tensor(tokens),
    )
    group = SourceGroup(
        EXPERTS,
        SHAPE,
        activations,
        samples=samples,
        activation=nn.functional.relu,
        max_stored=max_stored,
    )
    return replace(group, **changes)


def _encode(name: str, group: SourceGroup) -> EncodedGroup:
    method = method_of(MethodSpec(name=name))
    wanted = GroupCodecs(CodecSpec.parse("pruned:keep=0.5"), torch.float32, budget=0.5)
    return method.encode(group, method.codecs(wanted))


def _stored(encoded: EncodedGroup) -> Tensor:
    assert encoded.center is None
    return torch.stack([residual.decode() for residual in encoded.residuals])


def _assert_stores(encoded: EncodedGroup, expert_map: list[int], stored: list[Any]) -> None:
    assert encoded.expert_map == expert_map
    torch.testing.assert_close(_stored(encoded), torch.tensor(stored))


# Each method by hand


def test_averaging_takes_the_plain_mean_of_unaligned_experts():
    found = _encode("averaging", _group())

    _assert_stores(found, [0, 0, 1, 1], [[[2, 3], [4, 1]], [[3.0, 1.0], [2.0, 0.0]]])


def test_git_rebasin_swaps_neurons_to_match_the_dominant_expert():
    # ⟨E0, E1⟩ is 0, with neurons swapped 44; ⟨E3, E2⟩ is 9, swapped 16.
    found = _encode("git_rebasin", _group())

    _assert_stores(found, [0, 0, 1, 1], [[[6, 0], [0, 4]], [[1, 0.5], [4, 0.5]]])


def test_m_smoe_aligns_all_to_the_first_expert_and_weighs_by_frequency():
    # Aligned to expert 0: 1 and 3 with neurons swapped, 2 as it is. Weights 6 : 2 and 1 : 3.
    found = _encode("m_smoe", _group())

    _assert_stores(found, [0, 0, 1, 1], [[[5, 0], [0, 3]], [[3.5, 0.25], [1, 0.75]]])


def test_frequency_merging_aligns_to_the_dominant_expert():
    found = _encode("frequency_merging", _group())

    _assert_stores(found, [0, 0, 1, 1], [[[5, 0], [0, 3]], [[1, 0.75], [3.5, 0.25]]])


def test_uncurl_clusters_by_router_logits_whatever_experts_are_used_most():
    # The two most used experts are alike, so they become one.
    found = _encode("uncurl", _group([6, 2, 1, 1]))

    # Experts 2 and 3 count alike; 2 leads, and 3 matches it with its neurons swapped.
    assert found.expert_map == [0, 0, 1, 1]
    torch.testing.assert_close(
        _stored(found), torch.tensor([[[5.0, 0.0], [0.0, 3.0]], [[4.0, 0.5], [1.0, 0.5]]])
    )


def test_frequency_merging_keeps_the_most_used_experts_apart():
    found = _encode("frequency_merging", _group([6, 5, 1, 3]))

    assert found.expert_map == [0, 1, 1, 1]


def test_hc_smoe_merges_experts_with_close_mean_outputs():
    # Mean outputs of the experts over inputs of mean 1: 0, 0, 5 and 1.
    found = _encode("hc_smoe", _group())

    merged = [[27 / 11, 15 / 11], [25 / 11, 12 / 11]]
    _assert_stores(found, [0, 0, 1, 0], [merged, [[5, 1], [1, 0]]])


def test_frequency_pruning_keeps_the_most_used_experts():
    found = _encode("frequency_pruning", _group())

    _assert_stores(found, [0, -1, -1, 1], [EXPERTS[0].tolist(), EXPERTS[3].tolist()])


# What all of them share

MERGING = [
    "averaging",
    "git_rebasin",
    "repair",
    "zipit",
    "m_smoe",
    "hc_smoe",
    "uncurl",
    "frequency_merging",
]


@pytest.mark.parametrize("name", [*MERGING, "frequency_pruning"])
def test_all_experts_are_stored_unchanged_if_there_is_room(name):
    found = _encode(name, _group(max_stored=4))

    assert found.expert_map == [0, 1, 2, 3]
    # In any order of their neurons.
    for stored, expert in zip(_stored(found).tolist(), EXPERTS.tolist(), strict=True):
        assert sorted(stored) == sorted(expert)
    assert [loss.squared_error for loss in found.losses] == [0.0] * 4


@pytest.mark.parametrize("name", MERGING)
def test_one_stored_expert_stands_for_all(name):
    found = _encode(name, _group(max_stored=1))

    assert found.expert_map == [0, 0, 0, 0]


def test_losses_compare_each_expert_with_the_one_that_replaces_it():
    found = _encode("git_rebasin", _group())

    # Aligned, experts 0 and 1 differ by (4, 0), (0, 4), and 2 and 3 by (0, -1), (2, 1).
    errors = [loss.squared_error for loss in found.losses]
    norms = [loss.squared_norm for loss in found.losses]
    assert errors == pytest.approx([8, 8, 0 + 0.25 + 1 + 0.25, 0 + 0.25 + 1 + 0.25])
    assert norms == pytest.approx([20, 100, 27, 11])
    assert found.objective == pytest.approx((8 + 8 + 1.5 + 1.5) / 4)


def test_experts_that_no_token_reached_count_alike():
    found = _encode("m_smoe", _group([6, 2, 0, 0], max_stored=3))

    # Experts 0, 1 and 2 are dominant; 3 joins 2.
    assert found.expert_map == [0, 1, 2, 2]
    torch.testing.assert_close(_stored(found)[2], torch.tensor([[4.0, 0.5], [1.0, 0.5]]))


def test_unused_expert_does_not_change_the_one_it_joins():
    found = _encode("m_smoe", _group([6, 0, 1, 3]))

    torch.testing.assert_close(_stored(found)[0], EXPERTS[0])


def test_output_biases_are_merged_like_the_weights():
    shape = replace(SHAPE, output_bias=True)
    biases = torch.tensor([[1.0], [5.0], [10.0], [20.0]])

    found = _encode("m_smoe", _group(shape=shape, biases_EH=biases))

    assert found.biases is not None
    assert [bias.item() for bias in found.biases] == pytest.approx([2.0, 17.5])


@pytest.mark.parametrize("name", [*MERGING, "frequency_pruning"])
def test_methods_take_all_experts_of_a_layer_and_a_calibration_text(name):
    method = method_of(MethodSpec(name=name))

    assert (method.reduces, method.needs_samples) == ("experts", True)
    assert method.aligns_rows is (name not in {"averaging", "hc_smoe", "frequency_pruning"})


@pytest.mark.parametrize(
    "name", ["averaging", "git_rebasin", "repair", "zipit", "m_smoe", "mc_smoe", "uncurl"]
)
def test_unknown_router_logits_are_refused(name):
    group = _group()
    assert group.samples is not None

    with pytest.raises(UserError, match="this method compares router logits"):
        _encode(name, replace(group, samples=replace(group.samples, logits_TE=None)))


# How many experts each layer stores


@pytest.mark.parametrize(
    ("tokens", "total", "expected"),
    [
        # Shares of the second and later: 0.1, 0.1 and 0.3, 0.3.
        ([[8, 1, 1], [4, 3, 3]], 4, [1, 3]),
        ([[8, 1, 1], [4, 3, 3]], 5, [2, 3]),
        ([[8, 1, 1], [4, 3, 3]], 2, [1, 1]),
        ([[8, 1, 1], [4, 3, 3]], 6, [3, 3]),
        # More tokens in a layer do not count, only their shares.
        ([[800, 100, 100], [4, 3, 3]], 4, [1, 3]),
        ([[0, 0], [3, 1]], 3, [1, 2]),
        ([[2, 2], [2, 2]], 3, [2, 1]),
    ],
)
def test_dominant_experts_are_chosen_over_all_layers(tokens, total, expected):
    assert dominant_per_layer([torch.tensor(layer) for layer in tokens], total) == expected


@pytest.mark.parametrize("name", sorted(METHODS))
def test_layers_never_store_more_than_their_budget_together(name):
    method = method_of(MethodSpec(name=name))
    measured = [
        LayerActivations(
            input_rms_H=torch.ones(1),
            neuron_rms_EI=torch.ones(count, 2),
            tokens_E=torch.randint(0, 9, (count,)),
        )
        for count in (8, 5, 8, 3)
    ]

    found = method.experts_per_layer([8, 5, 8, 3], 0.4, measured)

    # Experts of which half is stored: twice as many.
    assert sum(found) == (6 + 4 + 6 + 2 if name == "mc_smoe" else 3 + 2 + 3 + 1)
    assert all(1 <= n <= count for n, count in zip(found, (8, 5, 8, 3), strict=True))
