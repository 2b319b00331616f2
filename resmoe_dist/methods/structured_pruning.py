"""`sp`: remove whole neurons, those whose row of the design matrix is smallest.

Structured pruning as paper 001 compares with (section 5): with `form: concat` a neuron is scored by
the norm of its row of [gate | up | downᵀ], and every expert loses the same number of rows. Stored:
experts with the share `keep` of their rows, dense.

Recipe: `--method sp --ep 1 --keep 0.25`.

Legend: E experts, I rows, D columns.
"""

from __future__ import annotations

import torch

from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import dense_codecs, encode_fewer_rows


@register_method
class StructuredPruning(Method):
    """Whole rows go, in each expert by itself."""

    name = "sp"
    reduces = "rows"

    def __init__(self, options: MethodConfig | None = None) -> None:
        super().__init__(options or MethodConfig())

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        return dense_codecs(wanted)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        rows = self.stored_rows(group.shape, codecs.budget)
        stored, restored = [], []
        for expert_ID in group.experts_EID:
            norm_I = expert_ID.float().norm(dim=1)
            kept = norm_I.topk(rows).indices.sort().values
            stored.append(expert_ID[kept])
            restored_ID = torch.zeros_like(expert_ID)
            restored_ID[kept] = expert_ID[kept].to(codecs.dtype).to(expert_ID.dtype)
            restored.append(restored_ID)
        return encode_fewer_rows(group, codecs, stored, restored)
