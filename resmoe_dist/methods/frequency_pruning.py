"""`frequency_pruning`: drop the experts that the calibration text uses least.

Paper 003 (UNCURL), section 4.2: task-specific pruning in one shot. Each layer keeps the share
`keep` of its experts, those that received the most tokens, unchanged; the router chooses among
those. Stored: the kept experts, dense. The paper then fine-tunes; this method does not.

Recipe: `--method frequency_pruning --ep 1 --keep 0.5 --calibration TEXT`.
"""

from __future__ import annotations

from collections.abc import Sequence

from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.fewer_experts import DroppingMethod
from resmoe_dist.methods.merged import most_used


@register_method
class FrequencyPruning(DroppingMethod):
    """Only the most used experts remain."""

    name = "frequency_pruning"

    def kept(self, group: SourceGroup, count: int) -> Sequence[int]:
        return most_used(group, count)
