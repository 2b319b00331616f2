"""`rtn`: each expert's weights rounded to few bits, without a centre. The yardstick.

Round-to-nearest affine quantisation in groups of `group_size` columns of a row, with the integers
that torchao computes. Stored: integers of `bits` bits, a scale and a zero point per group (codec
`rtn`), everything counted. The bytes follow from these options, so `--keep` changes nothing.

Recipe: `--method rtn:bits=4 --ep 1`.
"""

from __future__ import annotations

from dataclasses import replace

from resmoe_dist.codecs import CodecSpec, RtnConfig
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.plan import GroupPlan


class RtnMethodConfig(RtnConfig, MethodConfig):
    """The options of `--method rtn`: those of the codec."""


@register_method
class Rtn(Method):
    """Rounded weights, each expert by itself."""

    name = "rtn"
    config = RtnMethodConfig

    options: RtnMethodConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        residual = CodecSpec(name="rtn", options=self.options.model_dump())
        return replace(wanted, center=None, residual=residual)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        aligned = group.aligned(identity_permutations(group.experts_EID))
        found = encode_group(aligned, codecs, center="none")
        return EncodedGroup(None, found.residuals, found.losses, 0.0)
