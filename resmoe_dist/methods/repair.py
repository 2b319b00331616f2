"""`repair`: `git_rebasin`, then each merged neuron gets back the statistics of those it replaces.

REPAIR (Jordan et al. 2022, arXiv:2211.08403) as the baseline of paper 002 (M-SMoE, section 4.1).
The mean of matched neurons varies less than each of them. So the preactivations of a merged expert
are scaled and shifted until, over the calibration tokens of the layer, their standard deviation and
mean are the means of those of its cluster's neurons. Preactivations are linear in the tokens: their
moments follow from the tokens' mean and covariance.

A shift needs row biases. Experts without them are only scaled. Stored: the merged experts, dense.

Recipe: `--method repair --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, I rows, D columns, T tokens, H hidden, W inputs of a projection (H, and 1 for a
row bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_dist.design_matrix import projection_columns
from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.git_rebasin import GitRebasin
from resmoe_dist.methods.merged import Cluster, Merged
from resmoe_dist.methods.stored import BLOCK_TOKENS


@register_method
class Repair(GitRebasin):
    """Weight matching, plain mean, and the statistics of the matched neurons."""

    name = "repair"

    def merge(
        self, group: SourceGroup, clusters: Sequence[Cluster], shares: dict[int, float]
    ) -> Merged:
        merged = super().merge(group, clusters, shares)
        assert group.samples is not None
        moments = InputMoments.of(group.samples.inputs_TH)
        for part, merged_ID in zip(clusters, merged.experts, strict=True):
            members = [(group.experts_EID[k][merged.permutations_EI[k]], shares[k]) for k in part]
            for columns_W in projection_columns(group.shape)[:-1]:
                repaired_IW = repaired(
                    merged_ID[:, columns_W],
                    [(member_ID[:, columns_W], share) for member_ID, share in members],
                    moments,
                )
                merged_ID[:, columns_W] = repaired_IW
        return merged


@dataclass(frozen=True)
class InputMoments:
    """mean_H and covariance_HH of a layer's tokens, float64."""

    mean_H: Tensor
    covariance_HH: Tensor

    @classmethod
    def of(cls, inputs_TH: Tensor) -> InputMoments:
        """The moments of some tokens."""
        count = max(1, len(inputs_TH))
        mean_H = inputs_TH.sum(0, dtype=torch.float64) / count
        covariance_HH = torch.zeros(len(mean_H), len(mean_H), dtype=torch.float64)
        for block_RH in inputs_TH.split(BLOCK_TOKENS):
            centered_RH = block_RH.double() - mean_H
            covariance_HH += centered_RH.T @ centered_RH / count
        return cls(mean_H, covariance_HH)

    def of_neurons(self, weight_IW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [I] of preactivations, float64.

        weight_IW: input weights, and the bias if there is a column more than inputs.
        """
        hidden = len(self.mean_H)
        weight_IH = weight_IW[:, :hidden].double()
        mean_I = weight_IH @ self.mean_H + weight_IW[:, hidden:].double().sum(1)
        variance_I = ((weight_IH @ self.covariance_HH) * weight_IH).sum(1)
        return mean_I, variance_I.clamp_min(0.0).sqrt()


def repaired(
    merged_IW: Tensor, members: Sequence[tuple[Tensor, float]], moments: InputMoments
) -> Tensor:
    """Merged input weights [I, W] with the mean statistics of the members', float32.

    members: the weights [I, W] that were merged, rows matched, and their shares. Neurons that do
    not vary stay as they are.
    """
    hidden = len(moments.mean_H)
    mean_I, deviation_I = moments.of_neurons(merged_IW)
    wanted_mean_I, wanted_deviation_I = torch.zeros_like(mean_I), torch.zeros_like(mean_I)
    for member_IW, share in members:
        member_mean_I, member_deviation_I = moments.of_neurons(member_IW)
        wanted_mean_I += share * member_mean_I
        wanted_deviation_I += share * member_deviation_I
    varies_I = deviation_I > 0
    scale_I = torch.where(varies_I, wanted_deviation_I / deviation_I, 1.0)
    found_IW = merged_IW.double() * scale_I.unsqueeze(1)
    if merged_IW.shape[1] > hidden:
        shift_I = wanted_mean_I - scale_I * mean_I
        found_IW[:, hidden] += torch.where(varies_I, shift_I, 0.0)
    return found_IW.float()
