"""`svd`: the leading singular vectors of each expert, without a centre.

Truncated SVD as papers 001 (section 5) and 000 compare with. With `form: concat` it is that of the
design matrix [gate | up | downᵀ] (codec `low_rank`); with `form: sep` each projection has its own,
row biases included (codec `low_rank_blocks`). The rank follows from the budget as in paper 000,
appendix A.4: r = keep·I·D / (I + D) for a matrix [I, D]. Stored: both factors.

Recipe: `--method svd:form=concat --ep 1 --keep 0.25`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.errors import UserError
from resmoe_dist.methods.base import EncodedGroup, Method, SourceGroup, register_method
from resmoe_dist.methods.masked import FormConfig
from resmoe_dist.methods.plan import GroupPlan


@register_method
class TruncatedSvd(Method):
    """Factors of low rank, of each expert by itself."""

    name = "svd"
    config = FormConfig

    options: FormConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        if self.options.form == "sep":
            residual = blocks_codec(self.name, wanted)
        else:
            residual = CodecSpec(name="low_rank", options=_budget(self.name, wanted))
        return replace(wanted, center=None, residual=residual)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        aligned = group.aligned(identity_permutations(group.experts_EID))
        found = encode_group(aligned, codecs, center="none")
        return EncodedGroup(None, found.residuals, found.losses, 0.0)


def blocks_codec(method: str, wanted: GroupCodecs) -> CodecSpec:
    """`low_rank_blocks` with a block per projection and the budget that was asked for.

    Raises UserError for a codec that has no budget.
    """
    options = _budget(method, wanted) | {"blocks": wanted.projections}
    return CodecSpec(name="low_rank_blocks", options=options)


def _budget(method: str, wanted: GroupCodecs) -> dict[str, Any]:
    """The options `keep`, and `rank` if the codec that was asked for has one."""
    given = wanted.residual.options
    if wanted.residual.keep is None:
        raise UserError(
            f"--method {method}: takes its rank from --keep, which codec {wanted.residual.name} "
            "does not have; leave --codec out"
        )
    return {name: given[name] for name in ("keep", "rank") if name in given}
