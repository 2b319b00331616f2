"""k-means over the rows of a matrix: Lloyd's algorithm from a k-means++ start.

Arthur and Vassilvitskii 2007. In float64, so that the choice of a centroid does not depend on the
number of threads.

Legend: I rows, D columns, C centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_ROUNDS = 100


def cluster_rows(rows_ID: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids [C, D], float32, and the number of the centroid of each row [I].

    Every one of the `count` centroids has rows, and is their mean. seed: of the start. count must
    not exceed I.
    """
    points_ID = rows_ID.double()
    assert 1 <= count <= len(points_ID)
    norms_I = points_ID.square().sum(1)
    generator = torch.Generator().manual_seed(seed)
    centroids_CD = _spread_start(points_ID, norms_I, count, generator)
    chosen_I = torch.full((len(points_ID),), -1)
    for _ in range(_MAX_ROUNDS):
        distance_IC = _squared_distances(points_ID, norms_I, centroids_CD)
        nearest_I = _without_empty(distance_IC)
        if torch.equal(nearest_I, chosen_I):
            break
        chosen_I = nearest_I
        sizes_C = chosen_I.bincount(minlength=count)
        sums_CD = torch.zeros_like(centroids_CD).index_add_(0, chosen_I, points_ID)
        centroids_CD = sums_CD / sizes_C.unsqueeze(1)
    return centroids_CD.float(), chosen_I


def _spread_start(
    points_ID: Tensor, norms_I: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Rows, each drawn with a probability that grows with its distance to those drawn before."""
    drawn = [int(torch.randint(len(points_ID), (1,), generator=generator))]
    nearest_I = _squared_distances(points_ID, norms_I, points_ID[drawn]).squeeze(1)
    while len(drawn) < count:
        nearest_I[drawn] = 0.0
        total = float(nearest_I.sum())
        if total > 0:
            at = float(torch.rand(1, generator=generator, dtype=torch.float64)) * total
            row = int(torch.searchsorted(nearest_I.cumsum(0), at, right=True))
            row = min(row, int(nearest_I.nonzero()[-1]))
        else:
            # All other rows equal one that was drawn.
            row = next(i for i in range(len(points_ID)) if i not in drawn)
        drawn.append(row)
        distance_I1 = _squared_distances(points_ID, norms_I, points_ID[row : row + 1])
        nearest_I = torch.minimum(nearest_I, distance_I1.squeeze(1))
    return points_ID[drawn]


def _squared_distances(points_ID: Tensor, norms_I: Tensor, centroids_CD: Tensor) -> Tensor:
    """‖row − centroid‖² [I, C]. norms_I: ‖row‖²."""
    norms_C = centroids_CD.square().sum(1)
    distance_IC = norms_I.unsqueeze(1) + norms_C - 2 * (points_ID @ centroids_CD.T)
    return distance_IC.clamp_min(0.0)


def _without_empty(distance_IC: Tensor) -> Tensor:
    """The nearest centroid of each row; a centroid without rows takes the furthest row instead."""
    least_I, nearest_I = distance_IC.min(1)
    sizes_C = nearest_I.bincount(minlength=distance_IC.shape[1])
    for empty in (sizes_C == 0).nonzero().flatten().tolist():
        can_move_I = sizes_C[nearest_I] > 1
        row = int(torch.where(can_move_I, least_I, -1.0).argmax())
        sizes_C[nearest_I[row]] -= 1
        nearest_I[row], sizes_C[empty], least_I[row] = empty, 1, 0.0
    return nearest_I
