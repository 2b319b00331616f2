"""`zipit` and `repair`, which merge by what neurons do on tokens, by hand and by running experts.

Experts of one hidden dimension have rows (weight in, weight out).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.methods import EncodedGroup, MethodSpec, SourceGroup, method_of
from resmoe_dist.methods.repair import InputMoments, repaired
from resmoe_dist.methods.zipit import greedy_pairs, neuron_correlation, zip_neurons

# Positive neurons fire on some tokens, negative ones on the others.
TOKENS = torch.tensor([[-1.0], [1.0], [2.0], [-3.0], [0.5]])


def _group(experts_EID: Tensor, inputs_TH: Tensor = TOKENS, **shape: bool) -> SourceGroup:
    """Experts that the router treats alike, the first of them used most."""
    count, rows, _ = experts_EID.shape
    tokens, hidden = inputs_TH.shape
    samples = LayerSamples(
        inputs_TH=inputs_TH,
        index_TK=torch.zeros(tokens, 1, dtype=torch.int64),
        weights_TK=torch.ones(tokens, 1),
        logits_TE=torch.arange(1.0, tokens + 1).unsqueeze(1).repeat(1, count),
    )
    activations = LayerActivations(
        input_rms_H=torch.ones(hidden),
        neuron_rms_EI=torch.ones(count, rows),
        tokens_E=torch.arange(count, 0, -1),
    )
    return SourceGroup(
        experts_EID,
        ExpertShape(rows=rows, hidden=hidden, gated=False, **shape),
        activations,
        samples=samples,
        activation=nn.functional.relu,
        max_stored=1,
    )


def _merge(name: str, group: SourceGroup) -> EncodedGroup:
    method = method_of(MethodSpec(name=name))
    wanted = GroupCodecs(CodecSpec.parse("pruned:keep=0.5"), torch.float32, budget=0.5)
    return method.encode(group, method.codecs(wanted))


def _rows(encoded: EncodedGroup) -> list[list[float]]:
    (stored,) = encoded.residuals
    return sorted(stored.decode().tolist())


# zipit


def test_zipit_pairs_neurons_that_fire_together_whatever_their_weights():
    experts = torch.tensor([[[1.0, 10.0], [-2.0, 20.0]], [[-4.0, 1.0], [3.0, 2.0]]])

    found = _merge("zipit", _group(experts))

    # (1, 10) with (3, 2), and (−2, 20) with (−4, 1).
    assert _rows(found) == [pytest.approx([-3.0, 10.5]), pytest.approx([2.0, 6.0])]
    assert found.expert_map == [0, 0]
    # Compared with rows matched: (−1, 2) and (3, 2) off, (1, 10) and (−4, 1) from the nearest.
    errors = [(1, 4, 1, 9.5), (1, 9.5, 1, 4)]
    expected = [sum(value**2 for value in each) for each in errors]
    assert [loss.squared_error for loss in found.losses] == pytest.approx(expected)


def test_zipit_pairs_neurons_of_one_expert_and_halves_what_they_add():
    experts = torch.tensor([[[1.0, 10.0], [3.0, 20.0]], [[-4.0, 1.0], [-2.0, 2.0]]])

    found = _merge("zipit", _group(experts))

    assert _rows(found) == [pytest.approx([-3.0, 1.5]), pytest.approx([2.0, 15.0])]


def test_zipit_joins_the_experts_of_a_group_one_after_the_other():
    experts = torch.tensor([[[1.0, 3.0]], [[2.0, 6.0]], [[6.0, 9.0]]])

    assert _rows(_merge("zipit", _group(experts))) == [pytest.approx([3.0, 6.0])]


def test_zipit_of_copies_with_permuted_neurons_is_the_expert():
    expert = torch.randn(6, 8)
    inputs = torch.randn(40, 4)

    found = _merge("zipit", _group(torch.stack([expert, expert[torch.randperm(6)]]), inputs))

    assert _rows(found) == [pytest.approx(row, abs=1e-5) for row in sorted(expert.tolist())]
    assert [loss.squared_error for loss in found.losses] == pytest.approx([0, 0], abs=1e-8)


def test_correlations_are_those_of_the_activations():
    group = _group(torch.randn(1, 5, 6), torch.randn(700, 3))

    found = neuron_correlation(group, group.experts_EID[0], group.samples.inputs_TH)

    hidden = torch.relu(
        group.samples.inputs_TH @ from_rows(group.shape, group.experts_EID[0])["in"].T
    )
    torch.testing.assert_close(found, torch.corrcoef(hidden.T), atol=1e-4, rtol=0)


def test_neuron_that_never_fires_correlates_with_none():
    group = _group(torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [2.0, 1.0]]]), torch.rand(9, 1) + 1)

    found = neuron_correlation(group, group.experts_EID[0], group.samples.inputs_TH)

    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert found[0, 2] == pytest.approx(1.0)


def test_pairs_are_chosen_from_the_most_similar_down():
    similarity = torch.tensor(
        [
            [1.0, 0.8, 0.9, 0.1],
            [0.8, 1.0, 0.7, 0.2],
            [0.9, 0.7, 1.0, 0.6],
            [0.1, 0.2, 0.6, 1.0],
        ]
    )

    # 0 and 2 first; 1 and 3 are left, though each is closer to another.
    assert greedy_pairs(similarity) == [(0, 2), (1, 3)]


def test_pairs_equal_those_of_a_sort_of_all_pairs():
    similarity = torch.rand(24, 24)
    similarity += similarity.T.clone()

    expected: list[tuple[int, int]] = []
    pairs = [(float(similarity[i, j]), i, j) for i in range(24) for j in range(i + 1, 24)]
    for _, i, j in sorted(pairs, reverse=True):
        if not {i, j} & {neuron for pair in expected for neuron in pair}:
            expected.append((i, j))

    assert greedy_pairs(similarity) == expected


def test_zipped_gate_and_up_are_means_and_down_adds_up():
    both = torch.tensor([[1.0, 5.0, 8.0], [2.0, 6.0, 10.0], [3.0, 9.0, 4.0], [7.0, 1.0, 2.0]])

    found = zip_neurons(ExpertShape(rows=2, hidden=1), both, torch.tensor([[0, 1], [2, 3]]), 0.75)

    # Both of the first expert, whose share is 3/4; both of the second.
    assert found.tolist() == [[1.5, 5.5, 13.5], [5.0, 5.0, 1.5]]


# repair

# Two inputs that do not depend on each other, each with deviation 1.
SQUARE = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def test_repair_scales_a_mean_that_varies_less_than_its_neurons():
    experts = torch.tensor([[[1.0, 0.0, 5.0, 5.0]], [[0.0, 1.0, 7.0, 7.0]]])

    found = _merge("repair", _group(experts, SQUARE))

    # (½, ½) has deviation √½, both neurons have 1. Outputs are the mean.
    assert _rows(found) == [pytest.approx([0.5**0.5, 0.5**0.5, 6.0, 6.0])]


def test_repair_leaves_neurons_with_equal_weights_alone():
    experts = torch.tensor([[[4.0, 2.0]], [[8.0, 4.0]]])

    # 4x and 8x have deviations whose mean is that of 6x.
    assert _rows(_merge("repair", _group(experts))) == [pytest.approx([6.0, 3.0])]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("row_bias", [True, False])
def test_repaired_preactivations_have_the_mean_statistics_of_their_neurons(gated, row_bias):
    shape = ExpertShape(rows=7, hidden=4, gated=gated, row_bias=row_bias)
    experts = torch.randn(3, 7, shape.columns)
    inputs = torch.randn(600, 4) @ torch.randn(4, 4) + torch.randn(4)
    group = _group(experts, inputs)
    group = SourceGroup(**vars(group) | {"shape": shape})

    (stored,) = _merge("repair", group).residuals
    order = method_of(MethodSpec(name="git_rebasin")).permutations(group, [[0, 1, 2]])

    def statistics(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
        weights = from_rows(shape, matrix)
        values = nn.functional.linear(inputs, weights[name], weights.get(f"{name}_bias"))
        return values.mean(0), values.std(0, correction=0)

    for name in shape.inputs:
        members = [
            statistics(expert[perm], name) for expert, perm in zip(experts, order, strict=True)
        ]
        mean, deviation = statistics(stored.decode(), name)
        torch.testing.assert_close(deviation, sum(each for _, each in members) / 3)
        if row_bias:
            wanted = sum(each for each, _ in members) / 3
            torch.testing.assert_close(mean, wanted, atol=1e-4, rtol=1e-4)


def test_neurons_that_do_not_vary_stay_as_they_are():
    moments = InputMoments.of(torch.ones(5, 2))
    merged = torch.tensor([[1.0, 2.0]])

    assert torch.equal(repaired(merged, [(merged * 3, 1.0)], moments), merged)
