"""Second moments of what an expert multiplies, from the samples of its layer.

Legend: E experts of the group, I rows, T tokens of the layer, R tokens of the expert, M inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.codecs import Moments
from resmoe_dist.methods.base import SourceGroup
from resmoe_dist.methods.stored import neuron_activations
from resmoe_dist.routing import NO_EXPERT

# An expert with so many tokens per input weighs its own tokens and all tokens alike.
_TOKENS_PER_INPUT = 0.25
# Neurons of all tokens are computed for at most so many, evenly spread.
_MOST_TOKENS = 4096
# Share of the mean use that every expert counts as having.
_LEAST_USE = 0.1


def expert_moments(group: SourceGroup, permutations_EI: Tensor, expert: int) -> Moments:
    """Of an expert of the group, its rows in the order of `permutations_EI`.

    The tokens that the router sends to it, by their squared weights, and the tokens of the whole
    layer, which weigh more if the expert has few.
    """
    assert group.samples is not None
    own_RH, weight_R = group.samples.of_expert(group.number(expert))
    step = -(-len(group.samples.inputs_TH) // _MOST_TOKENS)
    all_TH = group.samples.inputs_TH[::step]
    permutation_I = permutations_EI[expert]
    share = len(own_RH) / (len(own_RH) + _TOKENS_PER_INPUT * own_RH.shape[1])

    def mixed(own_RM: Tensor, all_TM: Tensor) -> Tensor:
        return share * _moment(own_RM, weight_R) + (1 - share) * _moment(all_TM, None)

    return Moments(
        mixed(own_RH.float(), all_TH.float()),
        mixed(
            neuron_activations(group, expert, own_RH)[:, permutation_I],
            neuron_activations(group, expert, all_TH)[:, permutation_I],
        ),
    )


def use_weights(group: SourceGroup) -> tuple[float, ...]:
    """How much the error of each expert counts: Σ weight² of its tokens, 1 for the layer's mean.

    The output of an expert is multiplied by the token's routing weight. Experts that are hardly
    used count a little all the same, because other texts may use them. All alike without samples.
    """
    count = len(group.experts_EID)
    if group.samples is None:
        return (1.0,) * count
    used = [
        float(group.samples.of_expert(group.number(k))[1].float().square().sum())
        for k in range(count)
    ]
    was_sent_TK = group.samples.index_TK != NO_EXPERT
    all_used = float(group.samples.weights_TK[was_sent_TK].float().square().sum())
    mean = all_used / group.layer_experts
    return tuple(max(each / mean, _LEAST_USE) if mean else 1.0 for each in used)


def _moment(inputs_RM: Tensor, weight_R: Tensor | None) -> Tensor:
    """E[x xᵀ] [M, M], weighted by the squares of the tokens' weights; zeros without tokens."""
    if not len(inputs_RM):
        return torch.zeros(inputs_RM.shape[1], inputs_RM.shape[1])
    if weight_R is None:
        return inputs_RM.T @ inputs_RM / len(inputs_RM)
    weighted_RM = inputs_RM * weight_R.float().unsqueeze(1)
    return weighted_RM.T @ weighted_RM / weight_R.float().square().sum().clamp(min=1e-30)
