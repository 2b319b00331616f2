"""`frequency_pruning`: drop the experts that the calibration text uses least.

Paper 003 (UNCURL), section 4.2: task-specific pruning in one shot. Each layer keeps the share
`keep` of its experts, those that received the most tokens, unchanged; the router chooses among
those. Stored: the kept experts, dense. The paper then fine-tunes; this method does not.

Recipe: `--method frequency_pruning --ep 1 --keep 0.5 --calibration TEXT`.
"""

from __future__ import annotations

from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.merged import most_used
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import dense_codecs, keep_experts


@register_method
class FrequencyPruning(Method):
    """Only the most used experts remain."""

    name = "frequency_pruning"
    reduces = "experts"
    # Token counts alone would do, but a calibration text is asked for by this.
    needs_samples = True

    def __init__(self, options: MethodConfig | None = None) -> None:
        super().__init__(options or MethodConfig())

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        return dense_codecs(wanted)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        assert group.max_stored is not None
        return keep_experts(group, codecs, most_used(group, group.max_stored))
