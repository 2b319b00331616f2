"""`frequency_merging`: each layer's rarely used experts are merged into its most used ones.

The baseline of paper 003 (UNCURL), section 6.4.1: the most used experts of each layer stay, every
other joins the one with the most similar router logits, is aligned to it by weight matching, and a
group becomes its mean, weighted by how many tokens each expert received. Stored: the share `keep`
of a layer's experts, merged, dense.

Recipe: `--method frequency_merging --ep 1 --keep 0.5 --calibration TEXT`.

Legend: E experts, I rows.
"""

from __future__ import annotations

from resmoe_dist.methods.base import SourceGroup, register_method
from resmoe_dist.methods.merged import (
    Cluster,
    MatchedByUseMethod,
    routing_clusters,
)


@register_method
class FrequencyMerging(MatchedByUseMethod):
    """Groups around each layer's most used experts, then the mean by frequency, rows matched."""

    name = "frequency_merging"

    def clusters(self, group: SourceGroup, count: int) -> list[Cluster]:
        return routing_clusters(group, count)
