"""`reap`: drop the experts that contribute least to the layer's output.

REAP (Lasby et al. 2025, arXiv:2510.13999): the saliency of an expert is the mean, over the tokens
routed to it, of its routing weight times the norm of its output, g_k(x)·‖f_k(x)‖₂. Each layer
keeps the share `keep` of its experts, unchanged; the router chooses among those. Stored: the kept
experts, dense.

Recipe: `--method reap --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, R tokens of one expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.fewer_experts import DroppingMethod
from resmoe_dist.methods.stored import expert_outputs


@register_method
class Reap(DroppingMethod):
    """Router-weighted expert activation pruning."""

    name = "reap"

    def kept(self, group: SourceGroup, count: int) -> Sequence[int]:
        return saliency(group).topk(count).indices.tolist()


def saliency(group: SourceGroup) -> Tensor:
    """S_k [E]: the mean of g_k(x)·‖f_k(x)‖₂ over the tokens of expert k; 0 without tokens."""
    assert group.samples is not None
    found = torch.zeros(len(group.experts_EID), dtype=torch.float64)
    for k in range(len(found)):
        x_RH, weight_R = group.samples.of_expert(k)
        if len(x_RH):
            norm_R = expert_outputs(group, k, x_RH).norm(dim=1)
            found[k] = (weight_R.double() * norm_R).mean()
    return found
