"""`hc_smoe`: experts with similar outputs are merged.

HC-SMoE (Chen et al. 2024, arXiv:2410.08589): every expert runs on all calibration tokens of its
layer; experts are clustered hierarchically, with average linkage, by the Euclidean distance of
their mean outputs. Each layer stores the share `keep` of its experts: one per cluster, the mean
weighted by how many tokens each expert received. Neurons are not aligned. Stored: the merged
experts, dense.

Recipe: `--method hc_smoe --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from scipy.spatial.distance import pdist
from torch import Tensor

from resmoe_dist.compression.clustering import average_linkage
from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.merged import Cluster, MergingMethod, frequency, led_by_most_used
from resmoe_dist.methods.stored import BLOCK_TOKENS, expert_outputs


@register_method
class HCSMoE(MergingMethod):
    """Hierarchical clustering by mean output, then the mean by frequency."""

    name = "hc_smoe"

    def clusters(self, group: SourceGroup, count: int) -> list[Cluster]:
        if len(group.experts_EID) == 1:
            return [[0]]
        distances = pdist(mean_outputs(group).numpy())
        return led_by_most_used(group, average_linkage(distances, count))

    def importance(self, group: SourceGroup) -> Tensor:
        return frequency(group)


def mean_outputs(group: SourceGroup) -> Tensor:
    """The mean over all tokens of each expert's output, before routing weights, float64 [E, H]."""
    assert group.samples is not None
    inputs_TH = group.samples.inputs_TH
    found = torch.zeros(len(group.experts_EID), group.shape.hidden, dtype=torch.float64)
    for k in range(len(found)):
        for block_TH in inputs_TH.split(BLOCK_TOKENS):
            found[k] += expert_outputs(group, k, block_TH).sum(0, dtype=torch.float64)
    return found / max(1, len(inputs_TH))
