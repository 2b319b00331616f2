"""How alike a layer's router treats experts, and clusters of experts that it treats alike.

Legend: T tokens, E experts, C clusters.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.sparse.csgraph import laplacian
from torch import Tensor

from resmoe_dist.compression.clustering import clusters_of
from resmoe_dist.compression.samples import LayerSamples
from resmoe_dist.errors import UserError

# k-means depends on where it starts; the best of so many seeded starts counts.
_STARTS = 10


def router_similarity(samples: LayerSamples) -> Tensor:
    """The cosine of the router logits of each two experts over all tokens, float64 [E, E].

    Paper 002, equation 1. Raises UserError if the samples have no logits.
    """
    if samples.logits_TE is None:
        raise UserError(
            "this method compares router logits, and transformers does not say where this model "
            "computes them; choose a method that does not need them, such as hc_smoe or reap"
        )
    unit_TE = torch.nn.functional.normalize(samples.logits_TE.double(), dim=0)
    return unit_TE.T @ unit_TE


def spectral_clusters(affinity_EE: Tensor, clusters: int) -> list[list[int]]:
    """Split experts into `clusters` non-empty lists, in order of their first expert.

    affinity_EE: symmetric, not negative. Normalised spectral clustering (Shi and Malik 2000): the
    rows of the C eigenvectors of the random-walk Laplacian with the smallest eigenvalues, clustered
    by k-means from k-means++ starts. Seeded, so equal affinities give equal clusters.
    """
    count = len(affinity_EE)
    if clusters in (1, count):
        return [list(range(count))] if clusters == 1 else [[k] for k in range(count)]
    normalised_EE, root_degree_E = laplacian(affinity_EE.numpy(), normed=True, return_diag=True)
    _, vectors_EE = np.linalg.eigh(normalised_EE)
    rows_EC = vectors_EE[:, :clusters] / root_degree_E[:, None]
    return clusters_of(_k_means(rows_EC, clusters), clusters)


def _k_means(rows_EC: np.ndarray, clusters: int) -> list[int]:
    """The label of each row with the smallest sum of squared distances to its cluster's mean."""
    best = float("inf")
    best_labels: list[int] = []
    for start in range(_STARTS):
        with warnings.catch_warnings():
            # An empty cluster is no mistake: rows may be equal.
            warnings.simplefilter("ignore")
            means, labels = kmeans2(rows_EC, clusters, minit="++", seed=start)
        spread = float(((rows_EC - means[labels]) ** 2).sum())
        if spread < best:
            best, best_labels = spread, labels.tolist()
    return best_labels
