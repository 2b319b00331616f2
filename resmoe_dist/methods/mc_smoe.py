"""`mc_smoe`: merge experts as `m_smoe` does, then store each merged one as U·V + S.

MC-SMoE (Li et al. 2023, paper 002, arXiv:2310.01334), algorithm 1 with its compression step
(section 3.2): a merged expert's weight matrices become a product of low rank, U·V, and a part S
that keeps the columns with the largest scores. Stored: codec `low_rank_columns`.

A budget is that of all values: with `keep` 0.25 and experts of which half is stored (`share`),
layers store half of their experts. The paper stores a quarter of the experts, with rank 32 and a
tenth of the columns (`sparse`).

Simplified: the paper scores |s·∂L/∂s|, adds it up over training steps while it fine-tunes with
distillation, and prunes S by a cubic schedule over all layers. Without fine-tuning there is no
gradient: the score is |s| times the root mean square of what it is multiplied by, as in Wanda; S is
pruned at once, and the share of columns is the same everywhere.

Recipe: `--method mc_smoe:share=0.5,sparse=0.1 --ep 1 --keep 0.25 --calibration TEXT`.

Legend: I rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from resmoe_dist.codecs import (
    CodecSpec,
    EncodedMatrix,
    LowRankColumnsConfig,
    LowRankColumnsMatrix,
    SharesConfig,
)
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.stored_size import StoredSize
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.methods.base import MethodConfig, SourceGroup, register_method
from resmoe_dist.methods.m_smoe import MSMoE
from resmoe_dist.methods.merged import Merged


class MCSMoEConfig(SharesConfig, MethodConfig):
    """The options of `--method mc_smoe`: of each merged expert."""


@register_method
class MCSMoE(MSMoE):
    """Merged experts, each as low rank plus whole columns."""

    name = "mc_smoe"
    config = MCSMoEConfig

    options: MCSMoEConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        options = self.options.model_dump() | {"blocks": wanted.projections}
        residual = CodecSpec(name="low_rank_columns", options=options)
        return replace(wanted, center=None, residual=residual)

    def size(self, shape: ExpertShape, count: int, codecs: GroupCodecs) -> StoredSize:
        return replace(super().size(shape, count, codecs), entries_kept=self.options.share)

    def experts_per_layer(
        self, counts: Sequence[int], keep: float, activations: Sequence[LayerActivations] | None
    ) -> list[int]:
        return super().experts_per_layer(counts, min(1.0, keep / self.options.share), activations)

    def encoder(
        self, group: SourceGroup, merged: Merged
    ) -> Callable[[Tensor, GroupCodecs], EncodedMatrix]:
        weight_ID = group.aligned(merged.permutations_EI).block_weights(slice(None))
        cpu_weight_ID = None if weight_ID is None else weight_ID.cpu()

        def encode(matrix_ID: Tensor, codecs: GroupCodecs) -> EncodedMatrix:
            config = codecs.residual.config
            assert isinstance(config, LowRankColumnsConfig)
            return LowRankColumnsMatrix.fit(matrix_ID, config, codecs.dtype, cpu_weight_ID)

        return encode
