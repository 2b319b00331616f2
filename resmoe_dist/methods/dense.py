"""`dense`: experts are stored as they are. For the layers that `--layers` leaves out."""

from __future__ import annotations

from dataclasses import replace

from resmoe_dist.codecs import DENSE
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.plan import GroupPlan


@register_method
class Dense(Method):
    """No centre; each expert is a dense matrix, with its rows in stored order."""

    name = "dense"

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        return replace(wanted, center=None, residual=DENSE)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        plan = plan or self.plan(group, codecs)
        aligned = group.aligned(plan.permutations_EI)
        found = encode_group(aligned, codecs, center=plan.center)
        return EncodedGroup(found.center, found.residuals, found.losses, plan.objective)
