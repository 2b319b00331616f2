"""Second moments and use of experts, against sums over tokens written out."""

from __future__ import annotations

import torch

from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.design_matrix import ExpertShape, to_rows
from resmoe_dist.methods.base import SourceGroup
from resmoe_dist.methods.moments import expert_moments, use_weights

HIDDEN, ROWS, TOKENS = 3, 4, 6


def _gated(gate, up):
    return torch.relu(gate) * up


def _group(index_TK, weights_TK) -> SourceGroup:
    torch.manual_seed(0)
    shape = ExpertShape(ROWS, HIDDEN)
    experts = [
        to_rows(
            shape,
            {
                "gate": torch.randn(ROWS, HIDDEN),
                "up": torch.randn(ROWS, HIDDEN),
                "down": torch.randn(HIDDEN, ROWS),
            },
        )
        for _ in range(2)
    ]
    samples = LayerSamples(
        inputs_TH=torch.randn(TOKENS, HIDDEN),
        index_TK=torch.tensor(index_TK),
        weights_TK=torch.tensor(weights_TK),
    )
    return SourceGroup(torch.stack(experts), shape, samples=samples, activation=_gated)


def test_moments_are_weighted_sums_over_tokens():
    group = _group([[0], [0], [1], [0], [1], [1]], [[1.0], [0.5], [1.0], [2.0], [1.0], [1.0]])
    permutations = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])

    found = expert_moments(group, permutations, 0)

    x = group.samples.inputs_TH
    weights = {0: 1.0, 1: 0.5, 3: 2.0}
    # Three tokens of its own, against a quarter of a token for each of three inputs.
    share = 3 / (3 + 0.25 * HIDDEN)

    def mixed(values):
        own = sum(w**2 * torch.outer(values[t], values[t]) for t, w in weights.items())
        everyone = sum(torch.outer(each, each) for each in values) / TOKENS
        return share * own / sum(w**2 for w in weights.values()) + (1 - share) * everyone

    projections = group.projections(0)
    neurons = torch.relu(x @ projections["gate"].T) * (x @ projections["up"].T)
    torch.testing.assert_close(found.input_HH, mixed(x))
    torch.testing.assert_close(found.neuron_II, mixed(neurons[:, permutations[0]]))


def test_an_expert_without_tokens_gets_the_moments_of_all_tokens():
    group = _group([[0]] * TOKENS, [[1.0]] * TOKENS)

    found = expert_moments(group, torch.arange(ROWS).repeat(2, 1), 1)

    x = group.samples.inputs_TH
    torch.testing.assert_close(found.input_HH, x.T @ x / TOKENS)


def test_use_is_the_sum_of_squared_weights_over_its_mean():
    group = _group([[0], [0], [1], [0], [1], [1]], [[1.0], [0.5], [1.0], [2.0], [1.0], [1.0]])

    # 1 + 1/4 + 4 and 1 + 1 + 1: the mean is 33/8.
    assert use_weights(group) == (5.25 / 4.125, 3 / 4.125)


def test_unused_experts_count_a_little():
    assert use_weights(_group([[0]] * TOKENS, [[1.0]] * TOKENS)) == (2.0, 0.1)
