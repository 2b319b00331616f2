"""`up`: remove the entries of smallest magnitude, without a centre.

Unstructured pruning as papers 001 (section 5) and 000 (appendix A.3) compare with: W_k ∘ M_k, where
the mask M_k keeps the share `keep` of the entries by their L1 norm. With `form: concat` an expert
has one budget for its whole design matrix [gate | up | downᵀ]; with `form: sep` each of its
projections keeps the same share. With `--calibration` the activations weigh the magnitudes.

Stored: the kept entries and where they are (codec `pruned`).

Recipe: `--method up:form=concat --ep 1 --keep 0.25`.

Legend: I rows, D columns.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from resmoe_dist.codecs.pruned import largest_entries
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.compression.masks import weighted_magnitude
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.design_matrix import projection_columns
from resmoe_dist.methods.base import EncodedGroup, Method, SourceGroup, register_method
from resmoe_dist.methods.masked import FormConfig, encode_masked, masked_codecs
from resmoe_dist.methods.plan import GroupPlan


@register_method
class UnstructuredPruning(Method):
    """Single entries go, in each expert by itself."""

    name = "up"
    config = FormConfig

    options: FormConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        return masked_codecs(self.name, wanted)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        aligned = group.aligned(identity_permutations(group.experts_EID))
        if self.options.form == "sep":
            keep = codecs.residual.keep
            assert keep is not None, "a codec that selects entries has a budget"
            columns = projection_columns(group.shape)
            return encode_masked(
                group, codecs, partial(_mask_by_projection, aligned, columns, keep)
            )
        found = encode_group(aligned, codecs, center="none", allocate="expert")
        return EncodedGroup(None, found.residuals, found.losses, 0.0)


def _mask_by_projection(
    aligned: AlignedExperts, columns: list[Tensor], keep: float, expert: int
) -> Tensor:
    """Mask [I, D] of the share `keep` of each projection's entries."""
    every_row = slice(None)
    magnitude_ID = weighted_magnitude(aligned, aligned.expert_rows(expert, every_row), every_row)
    mask_ID = torch.zeros_like(magnitude_ID, dtype=torch.bool)
    for of_projection in columns:
        mask_ID[:, of_projection] = largest_entries(magnitude_ID[:, of_projection], keep)
    return mask_ID
