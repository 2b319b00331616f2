"""`resmoe`: align the experts of a group, store their shared centre and a residual each.

Paper 001 (ResMoE), section 4; one centre per group is paper 000, appendix B.1. By default centre
and kept entries are chosen together, and a group gets no centre if that loses less for the same
bytes. The papers' recipe is

    align: pot, center: barycenter, allocate: expert, with residuals `pruned` or `low_rank`
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from resmoe_dist.compression.alignment import Alignment, align
from resmoe_dist.compression.bits import GroupEnergies, errors_at, sizes_at
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.budget import PriceCurve, center_pays, centerless_keep
from resmoe_dist.compression.center import mean_center
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.compression.masks import BALANCED_RUN
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.compression.stages import stage
from resmoe_dist.design_matrix import projection_columns
from resmoe_dist.errors import UserError
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.moments import expert_moments, use_weights
from resmoe_dist.methods.plan import GroupPlan


class ResMoEConfig(MethodConfig):
    """The options of `--method resmoe`."""

    align: Literal["loo", "pot", "ot_fusion", "none"] = Field(
        default="loo",
        description="row alignment: leave-one-out descent, POT's barycentre of all columns or of "
        "the input projections', or none",
    )
    solver: Literal["scipy", "lapx"] = Field(
        default="scipy", description="solver of the assignments in leave-one-out descent"
    )
    center: Literal["auto", "joint", "barycenter", "mean", "none"] = Field(
        default="auto",
        description="chosen together with the residuals, and none where it does not pay for its "
        "bytes; the same without that exception; mean of the aligned experts; mean of the experts "
        "as stored; or none",
    )
    allocate: Literal["block", "expert", "group", "model"] = Field(
        default="group",
        description="what shares one budget of kept entries: 64 entries of a row, an expert, a "
        "group, or all layers",
    )


@register_method
class ResMoE(Method):
    """Centre and residuals. See the module's docstring."""

    name = "resmoe"
    config = ResMoEConfig
    chooses_bits = True

    options: ResMoEConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        spec, allocate = wanted.residual, self.options.allocate
        if allocate in ("block", "model") and not spec.codec.selects_entries:
            raise UserError(
                f"--allocate {allocate}: needs a codec that selects entries, such as pruned, not "
                f"{spec.name}"
            )
        if allocate == "block" and int((spec.keep or 0) * BALANCED_RUN) < 1:
            raise UserError(
                f"--allocate block: --keep {spec.keep} keeps none of {BALANCED_RUN} entries; "
                f"give {1 / BALANCED_RUN} or more"
            )
        return replace(wanted, center=None) if self.options.center == "none" else wanted

    @property
    def aligns_rows(self) -> bool:
        return self.options.center != "none" and self.options.align != "none"

    @property
    def shares_budget(self) -> bool:
        return self.options.allocate == "model"

    def plan(self, group: SourceGroup, codecs: GroupCodecs) -> GroupPlan:
        return self._plan(group, codecs)[0]

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        if plan is None:
            plan, aligned = self._plan(group, codecs)
        else:
            aligned = group.aligned(plan.permutations_EI)
        if plan.keep is not None:
            codecs = replace(codecs, residual=codecs.residual.with_keep(plan.keep))
        center, residual_bits = plan.center, None
        if plan.bits is not None:
            residual_bits = plan.bits.residual_E
            if plan.bits.center is None:
                center = "none"
            else:
                codecs = replace(codecs, center=codecs.residual.with_bits(plan.bits.center))
        moments = None
        if codecs.residual.codec.uses_moments and group.samples is not None:
            moments = partial(expert_moments, group, plan.permutations_EI)
        found = encode_group(
            aligned,
            codecs,
            center=center,
            allocate=self.options.allocate,
            moments=moments,
            residual_bits=residual_bits,
        )
        return EncodedGroup(found.center, found.residuals, found.losses, plan.objective)

    def _plan(self, group: SourceGroup, codecs: GroupCodecs) -> tuple[GroupPlan, AlignedExperts]:
        """A plan, and the aligned experts with the samples that it was made from."""
        options = self.options
        alignment = Alignment(identity_permutations(group.experts_EID), 0.0)
        if options.center != "none":
            alignment = align(
                group.experts_EID,
                options.align,
                solver=options.solver,
                device=group.device,
                input_columns=torch.cat(projection_columns(group.shape)[:-1]),
            )
        aligned = group.aligned(alignment.permutations_EI)
        center, keep = self._choose_center(group, aligned, codecs)
        curve = PriceCurve.of(aligned, center) if self.shares_budget else None
        plan = GroupPlan(alignment.permutations_EI, alignment.objective, center, keep, curve)
        if codecs.residual.codec.spends_bits:
            plan = replace(plan, energies=self._energies(group, aligned, codecs))
        return plan, aligned

    def _energies(
        self, group: SourceGroup, aligned: AlignedExperts, codecs: GroupCodecs
    ) -> GroupEnergies:
        spec, shape = codecs.residual, group.shape
        center_ID = mean_center(aligned, torch.float32)
        experts = [aligned.expert_rows(k, slice(None)).cpu() for k in range(aligned.count)]
        return GroupEnergies(
            residual_E=tuple(_energy(each - center_ID) for each in experts),
            whole_E=tuple(_energy(each) for each in experts),
            center=None if codecs.center is None else _energy(center_ID),
            weight_E=use_weights(group),
            errors=errors_at(spec),
            sizes=sizes_at(spec, shape.rows, shape.columns, codecs.dtype.itemsize),
        )

    @stage("center")
    def _choose_center(
        self, group: SourceGroup, aligned: AlignedExperts, codecs: GroupCodecs
    ) -> tuple[str, float | None]:
        """The kind of centre, and the budget: larger if the group does without a centre."""
        spec, keep = codecs.residual, codecs.residual.keep
        if self.options.center != "auto":
            return self.options.center, keep
        if codecs.center is None or keep is None or not spec.codec.selects_entries:
            return "joint", keep
        shape, center = group.shape, codecs.center
        itemsize = codecs.dtype.itemsize
        center_bytes = center.codec.stored_bytes(shape.rows, shape.columns, center.config, itemsize)
        center_share = center_bytes / (shape.entries * itemsize)
        if center_pays(aligned, spec, center_share):
            return "joint", keep
        return "none", centerless_keep(keep, aligned.count, center_share)


def _energy(matrix_ID: Tensor) -> float:
    """‖·‖², in float64."""
    return float(torch.linalg.vector_norm(matrix_ID, dtype=torch.float64)) ** 2
