"""Group similar experts of one rank, for ranks that hold several centres.

Legend: E experts, I rows, D columns, S columns of a sketch, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.scaling import power_of_two_scale


def cluster_experts(
    experts: Iterable[Tensor],
    clusters: int,
    *,
    device: torch.device = CPU,
    sketch_columns: int = 512,
    block_rows: int = 2048,
) -> list[list[int]]:
    """Split E experts, matrices [I, D], into `clusters` non-empty lists of indices.

    The distance of two experts is the sum over their rows of the squared distance to the nearest
    row of the other, in both directions. It is the alignment's objective without the constraint
    that partners differ, so it needs no assignment solver. Average linkage. The lists are in order
    of their first expert.

    Experts are read one at a time; only a sketch of each is kept. sketch_columns: about how many
    columns a sketch has. The default is enough to tell similar experts apart, and keeps the E²
    products of sketches cheap. block_rows: rows per product.
    """
    sketches = _sketches(experts, device, sketch_columns)
    count = len(sketches)
    if clusters in (1, count):
        return [list(range(count))] if clusters == 1 else [[k] for k in range(count)]
    distances = [
        _distance(sketches[a], sketches[b], block_rows)
        + _distance(sketches[b], sketches[a], block_rows)
        for a in range(count)
        for b in range(a + 1, count)
    ]
    return average_linkage(distances, clusters)


def average_linkage(distances: Sequence[float], clusters: int) -> list[list[int]]:
    """Split items into `clusters` non-empty lists, merging the closest two clusters repeatedly.

    distances: of all pairs (0, 1), (0, 2), …, (1, 2), … of two or more items. The distance of two
    clusters is the mean over the pairs of their items. The lists are in order of their first item.
    """
    # SciPy merges all clusters at equal distances at once, so it may find too few.
    labels = fcluster(linkage(distances, "average"), clusters, criterion="maxclust")
    return clusters_of(labels.tolist(), clusters)


def clusters_of(labels: Sequence[int], clusters: int) -> list[list[int]]:
    """The items of each label, in order of their first item.

    If there are fewer labels than `clusters`, items leave the largest lists until there are enough.
    """
    assert len(set(labels)) <= clusters <= len(labels)
    found = [[k for k, own in enumerate(labels) if own == label] for label in sorted(set(labels))]
    while len(found) < clusters:
        largest = max(found, key=len)
        found += [[largest.pop()]]
    return sorted(found)


def _sketches(experts: Iterable[Tensor], device: torch.device, sketch_columns: int) -> list[Tensor]:
    """Evenly spread columns of each expert [I, S], scaled so that squares fit in float32."""
    sketches = []
    for expert_ID in experts:
        step = max(1, expert_ID.shape[1] // sketch_columns)
        sketches.append(expert_ID[:, ::step].to(device, torch.float32, copy=True))
    scale = max(power_of_two_scale(sketch) for sketch in sketches)
    return [sketch / scale for sketch in sketches]


def _distance(from_IS: Tensor, to_IS: Tensor, block_rows: int) -> float:
    """Σ_i min_j ‖from_i − to_j‖²."""
    norms_I = to_IS.square().sum(1)
    total = float(from_IS.square().sum(dtype=torch.float64))
    for block_BS in from_IS.split(block_rows):
        nearest_B = (norms_I - 2 * (block_BS @ to_IS.T)).amin(1)
        total += float(nearest_B.sum(dtype=torch.float64))
    return max(0.0, total)
