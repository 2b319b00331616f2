"""`uncurl`: experts whose router logits are alike are clustered, and each cluster is merged.

UNCURL (Sarkar et al. 2024, paper 003), algorithm 1, in each layer by itself:

1. The affinity of two experts is (1 + cosine of their router logits over the calibration tokens)/2.
2. Spectral clustering of the affinities: the eigenvectors of the graph Laplacian, then k-means. The
   paper does not say which Laplacian; this is the normalised one of Shi and Malik (2000).
3. In each cluster, all experts are aligned to the most used one by weight matching.
4. A cluster becomes its mean, weighted by how many tokens each expert received.

Stored: the share `keep` of a layer's experts, merged, dense. The paper gives the smaller layer a
new router and fine-tunes it. Without fine-tuning, the router is kept: it chooses as before, and all
experts of a cluster are the same one.

Recipe: `--method uncurl --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, I rows.
"""

from __future__ import annotations

from resmoe_dist.compression.routing_similarity import router_similarity, spectral_clusters
from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.merged import (
    Cluster,
    MatchedByUseMethod,
    led_by_most_used,
)


@register_method
class Uncurl(MatchedByUseMethod):
    """Spectral clustering by router logits, then the mean by frequency, rows matched."""

    name = "uncurl"

    def clusters(self, group: SourceGroup, count: int) -> list[Cluster]:
        assert group.samples is not None
        affinity_EE = (1 + router_similarity(group.samples)) / 2
        return led_by_most_used(group, spectral_clusters(affinity_EE, count))
