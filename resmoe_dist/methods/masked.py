"""What methods share that store experts without a centre, with entries left out.

Legend: E experts of the group, I rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.losses import measure_loss
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.errors import UserError
from resmoe_dist.methods.base import EncodedGroup, MethodConfig, SourceGroup


class FormConfig(MethodConfig):
    """The option of methods that the papers apply in two ways."""

    form: Literal["concat", "sep"] = Field(
        default="concat",
        description="concat: the design matrix is one matrix; sep: each projection by itself",
    )


def masked_codecs(method: str, wanted: GroupCodecs) -> GroupCodecs:
    """No centre, and experts in the codec that was asked for.

    Raises UserError if that codec cannot keep chosen entries.
    """
    if not wanted.residual.codec.selects_entries:
        raise UserError(
            f"--method {method}: needs a codec that selects entries, such as pruned, not "
            f"{wanted.residual.name}"
        )
    return replace(wanted, center=None)


def encode_masked(
    group: SourceGroup, codecs: GroupCodecs, mask_of: Callable[[int], Tensor]
) -> EncodedGroup:
    """A group whose experts keep the entries of a mask. mask_of: expert -> boolean [I, D]."""
    aligned = group.aligned(identity_permutations(group.experts_EID))
    spec, every_row = codecs.residual, slice(None)
    residuals, losses = [], []
    for k in range(aligned.count):
        expert_ID = aligned.expert_rows(k, every_row)
        mask_ID = mask_of(k).to(expert_ID.device)
        encoded = spec.codec.encode(expert_ID, spec.config, codecs.dtype, mask_ID)
        kept = int(mask_ID.sum())
        losses.append(measure_loss(aligned, expert_ID, expert_ID, encoded, every_row, kept))
        residuals.append(encoded.cpu())
    return EncodedGroup(None, residuals, losses, 0.0)
