"""`d2_moe`: a shared base, and low-rank differences that fit the inputs.

D²-MoE (Gu et al. 2025, arXiv:2502.17298): the base is a weighted mean of a layer's experts, and the
difference of each expert from it is stored by an activation-aware truncated SVD. For a projection
with inputs x and second moment S = E[x xᵀ] = L Lᵀ, the difference Δ is stored as the best low-rank
approximation of Δ L, times L⁻¹: that minimises the error of its outputs, E‖Δx − Δ̂x‖².

Each projection has its own moment and its own factors. Gate and up read the tokens routed to the
expert, down reads the neurons' activations for these tokens. Stored: the base as the centre, the
factors of the differences (codec `low_rank_blocks`).

Simplified: experts are weighted by routing frequency alone, not by Fisher information, which needs
gradients; the base stays whole, where the paper also prunes its columns; the budget is the same
for all differences.

Recipe: `--method d2_moe --ep 1 --keep 0.25 --calibration TEXT`.

Legend: E experts, I rows, D columns, b blocks, W columns of a block, R tokens of one expert, M
inputs of a projection.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from resmoe_dist.codecs import EncodedMatrix, LowRankBlocksConfig, LowRankBlocksMatrix
from resmoe_dist.codecs.low_rank_blocks import split_blocks
from resmoe_dist.codecs.svd import low_rank_factors
from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.losses import measure_loss
from resmoe_dist.compression.permutations import identity_permutations
from resmoe_dist.errors import UserError
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.merged import shares_in, weighted_mean
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import neuron_activations
from resmoe_dist.methods.truncated_svd import blocks_codec


class D2MoEConfig(MethodConfig):
    """The options of `--method d2_moe`."""

    damping: float = Field(
        default=1e-2,
        gt=0,
        description="added to the diagonal of a second moment, as a share of its mean diagonal",
    )


@register_method
class D2MoE(Method):
    """Base and activation-aware low-rank differences. See the module's docstring."""

    name = "d2_moe"
    config = D2MoEConfig
    needs_samples = True

    options: D2MoEConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        if wanted.center is None:
            raise UserError(f"--method {self.name}: needs a centre")
        return replace(wanted, residual=blocks_codec(self.name, wanted))

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        center_spec, config = codecs.center, codecs.residual.config
        assert center_spec is not None and isinstance(config, LowRankBlocksConfig)
        everyone = list(range(len(group.experts_EID)))
        in_order_EI = identity_permutations(group.experts_EID)
        shares = shares_in([everyone], routed_tokens(group))
        base_ID = weighted_mean(group.experts_EID, everyone, shares, in_order_EI)
        center = center_spec.codec.encode(base_ID, center_spec.config, codecs.dtype)
        # The factors are computed on the CPU.
        on_cpu = replace(group, device=CPU)
        aligned = on_cpu.aligned(in_order_EI)
        residuals: list[EncodedMatrix] = []
        losses = []
        for k in range(aligned.count):
            expert_ID = aligned.expert_rows(k, slice(None))
            delta_ID = expert_ID - center.decode().float()
            factors = self._factors(group, k, delta_ID, config)
            residual = LowRankBlocksMatrix.of_factors(factors, delta_ID.shape[1], codecs.dtype)
            kept = residual.left.numel() + residual.right.numel()
            losses.append(measure_loss(aligned, expert_ID, delta_ID, residual, slice(None), kept))
            residuals.append(residual)
        return EncodedGroup(center, residuals, losses, 0.0)

    def _factors(
        self, group: SourceGroup, expert: int, delta_ID: Tensor, config: LowRankBlocksConfig
    ) -> list[tuple[Tensor, Tensor]]:
        """left [I, r] and right [r, W] of each projection's difference."""
        assert group.samples is not None
        x_RH, _ = group.samples.of_expert(group.number(expert))
        hidden_RI = neuron_activations(group, expert, x_RH)
        rank = config.rank_of(*delta_ID.shape)
        *inputs, output_IW = split_blocks(delta_ID, config.blocks)
        # A row bias is the weight of an input that is always 1, after the others.
        padding = inputs[0].shape[1] - x_RH.shape[1]
        x_RW = torch.nn.functional.pad(x_RH.double(), (0, padding), value=1.0)
        root_WW = moment_root(x_RW, self.options.damping)
        factors = [fitted_factors(block_IW, root_WW, rank) for block_IW in inputs]
        # The design matrix has downᵀ: its inputs are the rows.
        root_II = moment_root(hidden_RI.double(), self.options.damping)
        left_Wr, right_rI = fitted_factors(output_IW.T, root_II, rank)
        return [*factors, (right_rI.T, left_Wr.T)]


def routed_tokens(group: SourceGroup) -> Tensor:
    """How many of the sampled copies each expert of the group got, [E]."""
    assert group.samples is not None
    index_TK, count = group.samples.index_TK, len(group.experts_EID)
    return torch.tensor([int((index_TK == group.number(k)).sum()) for k in range(count)])


def moment_root(inputs_RM: Tensor, damping: float) -> Tensor:
    """L [M, M], float64, with L Lᵀ = E[x xᵀ] + damping · mean(diagonal) · 1.

    The identity if there are no inputs, or only zeros.
    """
    size = inputs_RM.shape[1]
    identity_MM = torch.eye(size, dtype=torch.float64)
    moment_MM = inputs_RM.T @ inputs_RM / max(1, len(inputs_RM))
    scale = float(moment_MM.diagonal().mean())
    if scale == 0.0:
        return identity_MM
    return torch.linalg.cholesky(moment_MM / scale + damping * identity_MM) * scale**0.5


def fitted_factors(weight_NM: Tensor, root_MM: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [N, r] and right [r, M] that minimise ‖(weight − left·right) L‖ at that rank."""
    scaled_NM = (weight_NM.double() @ root_MM).float()
    left_Nr, right_rM = low_rank_factors(scaled_NM, rank)
    # X L = right, that is Lᵀ Xᵀ = rightᵀ.
    solved_Mr = torch.linalg.solve_triangular(root_MM.T, right_rM.double().T, upper=True)
    return left_Nr, solved_Mr.T.float()
