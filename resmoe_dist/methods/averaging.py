"""`averaging`: groups of experts become their plain mean.

The baseline of paper 002 (M-SMoE, section 4.1; Choshen et al. 2022): the groups are those of
`m_smoe`, the neurons are not aligned, and all experts of a group count alike. Stored: the merged
experts, dense.

Recipe: `--method averaging --ep 1 --keep 0.5 --calibration TEXT`.
"""

from __future__ import annotations

from resmoe_dist.methods.base import register_method
from resmoe_dist.methods.merged import GlobalRoutingMethod


@register_method
class Averaging(GlobalRoutingMethod):
    """Plain mean of a group's experts, rows in stored order."""

    name = "averaging"
