"""`sp`: remove whole neurons, those whose weights have the smallest norm.

Structured pruning as paper 001 compares with (section 5). With `form: concat` a neuron is scored by
the norm of its row of [gate | up | downᵀ], and every expert loses the same number of rows. Stored:
experts with the share `keep` of their rows, dense.

With `form: sep` each projection loses its own rows (columns of down), by their norms in that
projection, biases included. The rows that are left do not match, so that is no smaller dense
matrix. Stored: the kept entries and where they are (codec `pruned`).

Recipe: `--method sp:form=concat --ep 1 --keep 0.25`.

Legend: E experts, I rows, D columns.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.design_matrix import projection_columns
from resmoe_dist.methods.base import EncodedGroup, Method, SourceGroup, register_method
from resmoe_dist.methods.masked import FormConfig, encode_masked, masked_codecs
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import dense_codecs, encode_fewer_rows


@register_method
class StructuredPruning(Method):
    """Whole rows go, in each expert by itself."""

    name = "sp"
    config = FormConfig

    options: FormConfig

    def __init__(self, options: FormConfig | None = None) -> None:
        super().__init__(options)
        self.reduces = "rows" if self.options.form == "concat" else "entries"

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        if self.options.form == "sep":
            return masked_codecs(self.name, wanted)
        return dense_codecs(wanted)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        if self.options.form == "sep":
            keep = codecs.residual.keep
            assert keep is not None, "a codec that selects entries has a budget"
            return encode_masked(group, codecs, partial(_mask_by_projection, group, keep))
        rows = self.stored_rows(group.shape, codecs.budget)
        stored, restored = [], []
        for expert_ID in group.experts_EID:
            kept = _largest_rows(expert_ID, rows)
            stored.append(expert_ID[kept])
            restored_ID = torch.zeros_like(expert_ID)
            restored_ID[kept] = expert_ID[kept].to(codecs.dtype).to(expert_ID.dtype)
            restored.append(restored_ID)
        return encode_fewer_rows(group, codecs, stored, restored)


def _largest_rows(matrix_ID: Tensor, count: int) -> Tensor:
    """The `count` rows of largest norm, in their order."""
    return matrix_ID.float().norm(dim=1).topk(count).indices.sort().values


def _mask_by_projection(group: SourceGroup, keep: float, expert: int) -> Tensor:
    """Mask [I, D] of the share `keep` of each projection's rows, rounded down."""
    expert_ID = group.experts_EID[expert]
    mask_ID = torch.zeros_like(expert_ID, dtype=torch.bool)
    rows = int(keep * group.shape.rows + 1e-9)
    for columns in projection_columns(group.shape):
        kept = _largest_rows(expert_ID[:, columns], rows)
        mask_ID[kept.unsqueeze(1), columns] = True
    return mask_ID
