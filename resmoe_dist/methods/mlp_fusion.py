"""`mlp_fusion`: cluster the neurons of each expert and keep the centroids.

MLP Fusion (Ai et al., arXiv:2307.08941) as in paper 000, appendix A.5: k-means over the rows of the
design matrix gives c = keep·I centroids W̃ [c, D] and a one-hot clustering matrix C [c, I]. The
fused expert is W̃₂ (C Cᵀ) σ(W̃₁ x): C Cᵀ has the sizes of the clusters on its diagonal. The error is
‖W − Cᵀ W̃‖². Stored: experts with c rows, dense, their output weights times the size of the cluster.

Recipe: `--method mlp_fusion:seed=0 --ep 1 --keep 0.25`.

Legend: I rows, D columns, C clusters.
"""

from __future__ import annotations

import torch
from pydantic import Field

from resmoe_dist.compression.encoding import GroupCodecs
from resmoe_dist.compression.k_means import cluster_rows
from resmoe_dist.design_matrix import projection_columns
from resmoe_dist.methods.base import (
    EncodedGroup,
    Method,
    MethodConfig,
    SourceGroup,
    register_method,
)
from resmoe_dist.methods.plan import GroupPlan
from resmoe_dist.methods.stored import dense_codecs, encode_fewer_rows


class MlpFusionConfig(MethodConfig):
    """The options of `--method mlp_fusion`."""

    seed: int = Field(default=0, ge=0, description="of the first centroids")


@register_method
class MlpFusion(Method):
    """Similar neurons become one, in each expert by itself."""

    name = "mlp_fusion"
    config = MlpFusionConfig
    reduces = "rows"

    options: MlpFusionConfig

    def codecs(self, wanted: GroupCodecs) -> GroupCodecs:
        return dense_codecs(wanted)

    def encode(
        self, group: SourceGroup, codecs: GroupCodecs, plan: GroupPlan | None = None
    ) -> EncodedGroup:
        count = self.stored_rows(group.shape, codecs.budget)
        output = projection_columns(group.shape)[-1]
        stored, restored = [], []
        for expert_ID in group.experts_EID:
            fused_CD, cluster_I = cluster_rows(expert_ID, count, self.options.seed)
            sizes_C1 = torch.bincount(cluster_I, minlength=count).unsqueeze(1)
            fused_CD[:, output] *= sizes_C1
            stored.append(fused_CD)
            # Rounded as the stored rows are.
            centroids_CD = fused_CD.to(codecs.dtype).to(torch.float32, copy=True)
            centroids_CD[:, output] /= sizes_C1
            restored.append(centroids_CD[cluster_I])
        return encode_fewer_rows(group, codecs, stored, restored)
