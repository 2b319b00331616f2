"""`git_rebasin`: groups of experts become their plain mean after their neurons are matched.

Git Re-Basin's weight matching (Ainsworth et al. 2022, arXiv:2209.04836) as the baseline of paper
002 (M-SMoE, section 4.1 and appendix A2): the neurons of each expert are permuted to match those of
its group's dominant expert. The groups are those of `m_smoe`, and all experts of a group count
alike. Stored: the merged experts, dense.

Recipe: `--method git_rebasin --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, I rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.merged import Cluster, GlobalRoutingMethod, match_leaders


@register_method
class GitRebasin(GlobalRoutingMethod):
    """Plain mean of a group's experts, rows matched to its dominant expert."""

    name = "git_rebasin"

    @property
    def aligns_rows(self) -> bool:
        return True

    def permutations(self, group: SourceGroup, clusters: Sequence[Cluster]) -> Tensor:
        return match_leaders(group, clusters)
