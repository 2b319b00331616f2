"""`mobe`: input projections as products with mixtures of bases that the experts of a group share.

MoBE (Mixture-of-Basis-Experts, Chen et al. 2025, arXiv:2508.05257): a gate or up projection becomes
A_k · silu(Σ_i α_ki B_i). Each expert has its own A_k and mixture α_k; the bases B_i are shared, one
set for gate and one for up. Down stays whole, so at least a third of a gated expert is stored. The
factors minimise the squared error of the weights (see `basis_mixtures`); no text is needed.

Stored: the bases in the place of the centre, A_k, α_k and down for each expert (codecs `bases` and
`mobe`). `keep` is the share of an expert's entries in A_k and down; the bases come on top, as a
centre does, and `--target-bytes` counts them. The paper takes a quarter as many bases as experts.

Simplified: the paper trains A, α and B together; here A is solved for in each step.

Recipe: `--method mobe:bases=2 --ep 1 --keep 0.5`.

Legend: E experts, I rows, D columns, p input projections, m bases, r rank, W columns of a block of
the design matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from resmoe_dist.codecs import BasesConfig, BasesMatrix, CodecSpec, EncodedMatrix, MobeMatrix
from resmoe_dist.codecs.low_rank_blocks import split_blocks
from resmoe_dist.compression.basis_mixtures import fit_mixtures
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.losses import measure_loss
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.compression.stored_size import StoredSize
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.errors import UserError
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.plan import GroupPlan


class MobeMethodConfig(MethodConfig):
    """The options of `--method mobe`."""

    bases: int = Field(default=2, ge=1, description="matrices shared by the experts of a group")
    steps: int = Field(default=300, ge=0, description="of gradient descent")


@register_method
class Mobe(Method):
    """Shared bases. See the module's docstring."""

    name = "mobe"
    config = MobeMethodConfig

    options: MobeMethodConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        keep = wanted.residual.keep
        if keep is None:
            raise UserError(
                f"--method {self.name}: takes its rank from --keep, which codec "
                f"{wanted.residual.name} does not have; leave --codec out"
            )
        options = {"keep": keep, "bases": self.options.bases, "blocks": wanted.projections}
        return replace(
            wanted,
            center=CodecSpec(name="bases", options=options),
            residual=CodecSpec(name="mobe", options=options),
        )

    def size(self, shape: ExpertShape, count: int, codecs: GroupCodecs) -> StoredSize:
        return replace(super().size(shape, count, codecs), center_shares_keep=True)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        config = codecs.residual.config
        assert isinstance(config, BasesConfig)
        rows, columns = group.experts_EID.shape[1:]
        if config.keep * config.blocks <= 1:
            raise UserError(
                f"--method {self.name}: stores {group.shape.output} whole, so keep must be above "
                f"{1 / config.blocks:.2f}, not {config.keep:.3g}"
            )
        aligned = group.aligned(identity_permutations(group.experts_EID))
        experts = [aligned.expert_rows(k, slice(None)) for k in range(aligned.count)]
        blocks = [split_blocks(expert_ID, config.blocks) for expert_ID in experts]
        rank = config.rank_of(rows, columns)
        fitted = [
            fit_mixtures(
                torch.stack([of_expert[j] for of_expert in blocks]),
                config.bases,
                rank,
                self.options.steps,
            )
            for j in range(config.blocks - 1)
        ]
        bases_pmrW = torch.stack([each.bases_mrW for each in fitted])
        center = BasesMatrix.of(bases_pmrW, rows, columns, codecs.dtype)
        width = columns // config.blocks
        residuals: list[EncodedMatrix] = []
        losses = []
        for k, expert_ID in enumerate(experts):
            residual = MobeMatrix.of(
                torch.stack([each.left_EIr[k] for each in fitted], dim=1),
                torch.stack([each.mixing_Em[k] for each in fitted]),
                blocks[k][-1][:, :width],
                center,
                codecs.dtype,
            )
            kept = residual.left.numel() + residual.output.numel()
            losses.append(measure_loss(aligned, expert_ID, expert_ID, residual, slice(None), kept))
            residuals.append(residual.cpu())
        return EncodedGroup(center.cpu(), residuals, losses, 0.0)
