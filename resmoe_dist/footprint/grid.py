"""What the ranks of a grid hold, and which grids there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resmoe_dist.errors import UserError
from resmoe_dist.footprint.experts import ExpertBytes, PlannedLayer
from resmoe_dist.footprint.lane_share import lane_share
from resmoe_dist.footprint.layout import Layout, StoredExperts, dense_layers
from resmoe_dist.footprint.structure import ModelStructure
from resmoe_dist.parallel.topology import Grid, lane_positions, owned_experts


@dataclass(frozen=True)
class Footprint:
    """Bytes of the rank that holds most, and of the checkpoint.

    batch_size: sequences, over all lanes. stored: the experts as stored. experts, dense_experts:
    compressed and dense. other: everything else. cache: KV cache.
    """

    grid: Grid
    batch_size: int
    stored: StoredExperts
    experts: ExpertBytes
    dense_experts: int
    other: int
    cache: int

    @property
    def sequences(self) -> int:
        """Sequences of one lane."""
        return -(-self.batch_size // self.grid.lanes)

    @property
    def total(self) -> int:
        """Bytes of a rank."""
        return self.experts.total + self.other + self.cache

    @property
    def dense_total(self) -> int:
        """Bytes of a rank if the experts were dense, divided over the same grid."""
        return self.dense_experts + self.other + self.cache


def grid_for(ep: int, tp: int, lanes: int | None = None, sequences: int | None = None) -> Grid:
    """A grid with the lanes that the runtime builds. sequences: to serve; None is many.

    Raises UserError if the lanes do not divide the grid.
    """
    return Grid(ep, tp, lane_ep=lane_positions(lanes, ep, 1, sequences))


def check_grid(structure: ModelStructure, grid: Grid) -> None:
    """Raise UserError for a grid that the experts do not divide over."""
    for site in structure.sites:
        owned_experts(site.num_experts, 0, grid.ep)
        if grid.tp > site.shape.rows:
            raise UserError(
                f"--tp {grid.tp}: {site.module} has {site.shape.rows} rows, fewer than ranks to "
                "share them"
            )


def footprint(
    structure: ModelStructure, layout: Layout, grid: Grid, batch_size: int = 1
) -> Footprint:
    """What the ranks of one grid hold. batch_size: sequences, divided over the lanes.

    Raises UserError if the model cannot be served on this grid.
    """
    check_grid(structure, grid)
    stored = layout.experts(grid.ep)
    itemsize = structure.dtype.itemsize
    sequences = -(-batch_size // grid.lanes)
    dense = dense_layers(structure.sites, structure.dtype)
    share = lane_share(structure, grid.lane_size)
    return Footprint(
        grid,
        batch_size,
        stored,
        largest_rank(stored.layers, grid, itemsize),
        largest_rank(dense, grid, itemsize).total,
        share.other,
        share.cache * sequences,
    )


def largest_rank(layers: Sequence[PlannedLayer], grid: Grid, itemsize: int) -> ExpertBytes:
    """Expert bytes of the rank that holds most. itemsize: bytes of a value in memory."""
    found = []
    # The first rank of a lane has the output biases, the last one a row more if they do not divide.
    for tp_rank in {0, grid.tp - 1}:
        by_layer = [layer.rank_bytes(grid.ep, grid.tp, tp_rank, itemsize) for layer in layers]
        found += [sum(parts, ExpertBytes()) for parts in zip(*by_layer, strict=True)]
    return max(found, key=lambda rank: rank.total)


def grids_up_to(
    structure: ModelStructure, ranks: int, lanes: int | None = None, sequences: int | None = None
) -> list[Grid]:
    """Every grid of at most `ranks` ranks whose tp is a power of two, by ep and tp.

    lanes: as many where they divide ep; otherwise, and by default, as many as `grid_for` gives.
    """
    experts = math.gcd(*(site.num_experts for site in structure.sites))
    rows = min(site.shape.rows for site in structure.sites)
    found = []
    for ep in (ep for ep in range(1, min(ranks, experts) + 1) if experts % ep == 0):
        asked = lanes if lanes and ep % lanes == 0 else None
        tp = 1
        while ep * tp <= ranks and tp <= rows:
            found.append(grid_for(ep, tp, asked, sequences))
            tp *= 2
    return found
