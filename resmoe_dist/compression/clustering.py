"""Which experts of a rank share a centre, where a rank has several.

Legend: N experts, I rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from resmoe_dist.compression.blocks import CPU, unit_of

# Columns used to tell which experts resemble each other: enough for that, and N² products of them
# stay cheap.
_COLUMNS = 512
_BLOCK_ROWS = 2048


def cluster_experts(
    experts: Iterable[Tensor], clusters: int, *, device: torch.device = CPU
) -> list[list[int]]:
    """Split experts, N matrices [I, D], into `clusters` non-empty lists of indices, alike together.

    Each is needed for a moment only: a sketch of it is kept.

    The distance of two experts is that of their rows, each matched to the nearest of the other,
    both ways: the alignment's objective without its constraint that partners differ, which costs
    no solver. Average linkage; lists in order of their first expert.
    """
    sketches = _sketches(experts, device)
    count = len(sketches)
    assert clusters <= count
    if clusters in (1, count):
        return [list(range(count))] if clusters == 1 else [[k] for k in range(count)]
    distances = [
        _distance(sketches[a], sketches[b]) + _distance(sketches[b], sketches[a])
        for a in range(count)
        for b in range(a + 1, count)
    ]
    labels = fcluster(linkage(distances, "average"), clusters, criterion="maxclust")
    found = [[k for k in range(count) if labels[k] == label] for label in sorted(set(labels))]
    while len(found) < clusters:
        # Equal distances are merged at once: more clusters than asked for are not, fewer may be.
        largest = max(found, key=len)
        found += [[largest.pop()]]
    return sorted(found)


def _sketches(experts: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Evenly spread columns of each expert, in units that keep squares within float32."""
    sketches = []
    for expert_ID in experts:
        step = max(1, expert_ID.shape[1] // _COLUMNS)
        sketches.append(expert_ID[:, ::step].to(device, torch.float32, copy=True))
    unit = max(unit_of(sketch) for sketch in sketches)
    return [sketch / unit for sketch in sketches]


def _distance(from_IS: Tensor, to_IS: Tensor) -> float:
    """Σ_i min_j ‖from_i − to_j‖²."""
    norms_I = to_IS.square().sum(1)
    total = float(from_IS.square().sum(dtype=torch.float64))
    for block_BS in from_IS.split(_BLOCK_ROWS):
        nearest_B = (norms_I - 2 * (block_BS @ to_IS.T)).amin(1)
        total += float(nearest_B.sum(dtype=torch.float64))
    return max(0.0, total)
