"""`zipit`: neurons with correlated activations are merged, also two of the same expert.

ZipIt! (Stoica et al. 2023, arXiv:2305.03053) as the baseline of paper 002 (M-SMoE, section 4.1),
which does not say how groups of more than two experts are zipped. Here the groups are those of
`m_smoe`, and the experts of a group join its dominant one, one after the other:

1. Both experts run on all calibration tokens of the layer.
2. Of their 2I neurons, the two whose activations correlate most become a pair, then the next two of
   those left, until there are I pairs.
3. A pair becomes one neuron: the mean of its input weights. It adds to the output what its neurons
   added in their experts, and experts are averaged: so its output weights are the sum of the
   neurons' output weights times their experts' shares.

Pairs across experts alone would be a permutation and a mean. Stored: the merged experts, dense. The
errors compare an expert with the merged one, rows matched.

Two experts with I rows take about 32·I² bytes beside their weights.

Recipe: `--method zipit --ep 1 --keep 0.5 --calibration TEXT`.

Legend: I rows, D columns, T tokens, R tokens of a block, H hidden, N = 2I neurons, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resmoe_dist.compression.assignment import best_assignment
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.design_matrix import ExpertShape, projection_columns
from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.merged import Cluster, GlobalRoutingMethod, Merged
from resmoe_dist.methods.stored import BLOCK_TOKENS, activations_of


@register_method
class ZipIt(GlobalRoutingMethod):
    """Pairs of correlated neurons, within and across experts."""

    name = "zipit"

    @property
    def aligns_rows(self) -> bool:
        return True

    def merge(
        self, group: SourceGroup, clusters: Sequence[Cluster], shares: dict[int, float]
    ) -> Merged:
        experts = [self._zipped(group, part) for part in clusters]
        permutations_EI = identity_permutations(group.experts_EID)
        for part, merged_ID in zip(clusters, experts, strict=True):
            for k in part if len(part) > 1 else ():
                permutations_EI[k] = best_assignment(
                    merged_ID, group.experts_EID[k], device=group.device
                )
        return Merged(experts, permutations_EI)

    def _zipped(self, group: SourceGroup, part: Cluster) -> Tensor:
        """The experts of a cluster as one [I, D], float32."""
        assert group.samples is not None
        merged_ID = group.experts_EID[part[0]].float()
        for joined, k in enumerate(part[1:], start=1):
            both_ND = torch.cat([merged_ID, group.experts_EID[k].float()])
            similarity_NN = neuron_correlation(group, both_ND, group.samples.inputs_TH)
            pairs_P2 = torch.tensor(greedy_pairs(similarity_NN))
            merged_ID = zip_neurons(group.shape, both_ND, pairs_P2, joined / (joined + 1))
        return merged_ID


def neuron_correlation(group: SourceGroup, matrix_ND: Tensor, inputs_TH: Tensor) -> Tensor:
    """Correlation [N, N] of the activations of some neurons over some tokens, float32.

    Neurons that do not vary correlate with none.
    """
    blocks = inputs_TH.split(BLOCK_TOKENS)
    mean_N = torch.zeros(len(matrix_ND), dtype=torch.float64)
    for block_RH in blocks:
        mean_N += activations_of(group, matrix_ND, block_RH).sum(0, dtype=torch.float64)
    mean_N /= max(1, len(inputs_TH))
    covariance_NN = torch.zeros(len(mean_N), len(mean_N))
    for block_RH in blocks:
        centered_RN = (activations_of(group, matrix_ND, block_RH) - mean_N).float()
        covariance_NN.addmm_(centered_RN.T, centered_RN)
    # The diagonal is a sum of squares: zero for a neuron that does not vary, but for rounding.
    deviation_N = covariance_NN.diagonal().sqrt()
    scale_N = torch.where(deviation_N > 0, 1 / deviation_N, 0.0)
    return covariance_NN.mul_(scale_N).mul_(scale_N.unsqueeze(1))


def greedy_pairs(similarity_NN: Tensor) -> list[tuple[int, int]]:
    """Pairs of an even number of neurons, the most similar first; earlier neurons win ties."""
    # The symmetric matrix without pairs of a neuron with itself, and without paired neurons.
    left_NN = similarity_NN.clone().fill_diagonal_(-torch.inf)
    best_N, partner_N = left_NN.max(1)
    paired = [False] * len(left_NN)
    found: list[tuple[int, int]] = []
    while len(found) < len(left_NN) // 2:
        first = int(best_N.argmax())
        second = int(partner_N[first])
        if paired[second]:
            # Its partner went to another neuron.
            best_N[first], partner_N[first] = left_NN[first].max(0)
            continue
        found.append((min(first, second), max(first, second)))
        for neuron in found[-1]:
            paired[neuron] = True
            left_NN[:, neuron] = best_N[neuron] = -torch.inf
    return found


def zip_neurons(
    shape: ExpertShape, both_ND: Tensor, pairs_P2: Tensor, first_share: float
) -> Tensor:
    """Each pair of neurons of two experts as one neuron [P, D], float32.

    both_ND: the rows of the first expert, then those of the second. first_share: how much the first
    one counts in the mean of the two experts; the second counts for the rest.
    """
    share_N = torch.full((len(both_ND), 1), first_share)
    share_N[len(both_ND) // 2 :] = 1 - first_share
    pair_share_P2 = share_N.squeeze(1)[pairs_P2].unsqueeze(2)
    rows_P2D = both_ND[pairs_P2]
    merged_PD = (rows_P2D * pair_share_P2).sum(1)
    # Two neurons of one expert have shares that do not add up to 1.
    inputs = torch.cat(projection_columns(shape)[:-1])
    merged_PD[:, inputs] /= pair_share_P2.sum(1)
    return merged_PD
