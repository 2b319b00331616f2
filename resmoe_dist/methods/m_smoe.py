"""`m_smoe`: rarely used experts are merged into the dominant ones that the router treats alike.

M-SMoE (Li et al. 2023, paper 002, arXiv:2310.01334), algorithm 1 without its compression step:

1. All experts of a layer are aligned to its first one by weight matching.
2. Dominant experts are the most used of all layers together, at least one per layer.
3. Every other expert joins the dominant one of its layer whose router logits over the calibration
   tokens are most similar by cosine (equation 1).
4. A group becomes its mean, weighted by how many tokens each expert received (equation 2).

Stored: the merged experts, dense. Layers store different numbers of experts, on average the share
`keep`. The paper then fine-tunes; this method does not.

Recipe: `--method m_smoe --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, I rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.merged import Cluster, GlobalRoutingMethod, frequency, match_rows


@register_method
class MSMoE(GlobalRoutingMethod):
    """Mean by frequency of a group's experts, rows matched to the layer's first expert."""

    name = "m_smoe"

    @property
    def aligns_rows(self) -> bool:
        return True

    def permutations(self, group: SourceGroup, clusters: Sequence[Cluster]) -> Tensor:
        return match_rows(group, [0] * len(group.experts_EID))

    def importance(self, group: SourceGroup) -> Tensor:
        return frequency(group)
