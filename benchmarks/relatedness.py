"""How related the experts of a model are: what is left of them after their mean is subtracted.

    Σ_k ‖T_k W_k − C‖² / Σ_k ‖W_k‖²        C: the mean of the aligned experts T_k W_k of a group

summed over the groups of a layer. 0: all experts of a group are equal, up to the order of their
rows. Independent experts of n per group have 1 − 1/n, less what alignment gains by chance.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.alignment import align


def energy_left(experts_EID: Tensor, group: int) -> float:
    """The share above for one layer, with groups of `group` consecutive experts."""
    left = sum(len(part) * align(part).objective for part in experts_EID.split(group))
    return left / float(experts_EID.double().square().sum())


def relatedness(folder: Path, groups: tuple[int, ...]) -> list[list[float]]:
    """`energy_left` of each layer of a model folder, for each size of group.

    Raises UserError for a folder without a model that has experts.
    """
    source = SourceCheckpoint(folder)
    found = []
    for layer, site in enumerate(source.sites):
        experts_EID = torch.stack(
            [source.read_expert(layer, k)[0].float() for k in range(site.num_experts)]
        )
        found.append([energy_left(experts_EID, min(size, site.num_experts)) for size in groups])
    return found
