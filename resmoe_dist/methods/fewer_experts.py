"""Methods that store fewer experts, chosen by what a calibration text shows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.methods.base import EncodedGroup, Method, SourceGroup
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import dense_codecs, keep_experts


class FewerExperts(Method):
    """Each layer stores the share `keep` of its experts, dense and without a centre."""

    reduces = "experts"
    needs_samples = True

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        return dense_codecs(wanted)


class DroppingMethod(FewerExperts):
    """Some experts remain, unchanged, and the router chooses among those."""

    @abstractmethod
    def kept(self, group: SourceGroup, count: int) -> Sequence[int]:
        """The `count` experts that remain."""

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        assert group.max_stored is not None
        return keep_experts(group, codecs, self.kept(group, group.max_stored))
