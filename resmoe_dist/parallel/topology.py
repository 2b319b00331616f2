"""The grid of ranks: world = dp · ep · tp, rank = (dp_rank · ep + ep_rank) · tp + tp_rank.

Tensor-parallel ranks are neighbours and hold row ranges of the same experts. The ranks of one
expert-parallel group own different experts of a layer. A *replica* is the ep·tp ranks that hold one
whole model between them; there are dp of them.

A *lane* is the ranks that carry one batch together: lane_ep neighbouring expert-parallel positions
with all their tensor-parallel ranks. Lanes carry different sequences. With lane_ep = 1 a lane is
one tensor-parallel group; with lane_ep = ep it is a whole replica, with a multiple of ep several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import deepspeed.comm as dist
import torch
from deepspeed.utils import bwc, groups

from resmoe_dist.errors import UserError


@dataclass(frozen=True)
class Grid:
    """dp · ep · tp ranks, and how many expert-parallel positions make a lane (lane_ep).

    lane_ep divides ep, or is a multiple of it: a lane is a part of a replica, or whole replicas.
    """

    ep: int = 1
    tp: int = 1
    dp: int = 1
    lane_ep: int = 1

    @property
    def lanes(self) -> int:
        """Number of lanes of the whole grid."""
        return self.dp * self.ep // self.lane_ep

    @property
    def replica_lanes(self) -> int:
        """Number of lanes that meet in one replica."""
        return max(1, self.ep // self.lane_ep)

    @property
    def lane_replicas(self) -> int:
        """Number of replicas that work for one lane; 1 if it has a part of one."""
        return max(1, self.lane_ep // self.ep)

    @property
    def lane_size(self) -> int:
        """Ranks of one lane."""
        return self.lane_ep * self.tp

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.ep * self.tp

    @property
    def linked_size(self) -> int:
        """Ranks that take every step together: a replica's, or those of a lane of several."""
        return max(self.replica_size, self.lane_size)


@dataclass(frozen=True)
class Topology(Grid):
    """This rank's place in the grid. A group of a single rank is None.

    ep_group, tp_group: DeepSpeed's. replica_group: the ep·tp ranks of this replica. lane_group: the
    ranks of this lane. peer_group: the ranks at the same position in the other lanes of this
    replica, in the order of the lanes; None if a lane has it to itself.
    """

    ep_rank: int = 0
    tp_rank: int = 0
    dp_rank: int = 0
    ep_group: torch.distributed.ProcessGroup | None = None
    tp_group: torch.distributed.ProcessGroup | None = None
    replica_group: torch.distributed.ProcessGroup | None = None
    lane_group: torch.distributed.ProcessGroup | None = None
    peer_group: torch.distributed.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This rank's number in the world."""
        return (self.dp_rank * self.ep + self.ep_rank) * self.tp + self.tp_rank

    @property
    def lane(self) -> int:
        """This rank's lane."""
        return self.rank // self.lane_size

    @property
    def lane_rank(self) -> int:
        """This rank's position in its lane."""
        return self.rank % self.lane_size

    @property
    def linked_group(self) -> torch.distributed.ProcessGroup | None:
        """The `linked_size` ranks that take every step together with this one."""
        return self.lane_group if self.lane_replicas > 1 else self.replica_group

    def owned_experts(self, num_experts: int) -> range:
        """The experts of a layer that this rank's expert-parallel position owns."""
        return owned_experts(num_experts, self.ep_rank, self.ep)

    def without_groups(self) -> Topology:
        """The same place, to send to other processes: process groups cannot travel."""
        return replace(
            self,
            ep_group=None,
            tp_group=None,
            replica_group=None,
            lane_group=None,
            peer_group=None,
        )


SINGLE_PROCESS = Topology()


def grid_position(rank: int, ep: int, tp: int) -> tuple[int, int, int]:
    """(dp_rank, ep_rank, tp_rank) of a global rank."""
    lane, tp_rank = divmod(rank, tp)
    dp_rank, ep_rank = divmod(lane, ep)
    return dp_rank, ep_rank, tp_rank


def owned_experts(num_experts: int, ep_rank: int, ep: int) -> range:
    """Experts [ep_rank · E/ep, (ep_rank + 1) · E/ep), as DeepSpeed-MoE assigns them.

    Raises UserError if ep does not divide the number of experts.
    """
    if num_experts % ep:
        divisors = [str(d) for d in range(1, num_experts + 1) if num_experts % d == 0]
        raise UserError(
            f"--ep {ep}: {num_experts} experts do not divide among {ep} ranks; choose one of "
            f"{', '.join(divisors)}"
        )
    size = num_experts // ep
    return range(ep_rank * size, (ep_rank + 1) * size)


def lane_choices(ep: int, dp: int) -> list[int]:
    """The numbers of lanes that a grid can have, in ascending order.

    Those that divide ep·dp, except where a lane would have parts of two replicas.
    """
    sizes = [n for n in range(1, ep * dp + 1) if ep * dp % n == 0 and (ep % n == 0 or n % ep == 0)]
    return [ep * dp // size for size in reversed(sizes)]


def lane_positions(lanes: int | None, ep: int, dp: int, sequences: int | None = None) -> int:
    """lane_ep for a number of lanes; None: as many as possible.

    sequences: that there are to carry; None is many. With `lanes` None every lane gets at least
    one.

    Raises UserError if the lanes do not divide the grid evenly, or would cut a replica between two.
    """
    choices = lane_choices(ep, dp)
    if lanes is None:
        lanes = max((n for n in choices if sequences is None or n <= sequences), default=1)
    if lanes not in choices:
        raise UserError(
            f"--lanes {lanes}: a grid with ep {ep} and dp {dp} has {' or '.join(map(str, choices))}"
        )
    return ep * dp // lanes


def build_topology(
    ep: int, tp: int, lanes: int | None = None, sequences: int | None = None
) -> Topology:
    """Build the grid's process groups through DeepSpeed; collective over the world.

    lanes: of the whole grid; None is as many as there are `sequences` for (None: many), at most
    ep·dp. `deepspeed.init_distributed` must have run. Groups of
    an existing model-parallel unit (`deepspeed.utils.groups.mpu`) are used as they are.

    Raises UserError if the world is not a multiple of ep·tp, if the lanes do not divide it, or if
    DeepSpeed already has groups of another grid in this process (it caches them by name, which does
    not include TP).
    """
    world = dist.get_world_size()
    if world % (ep * tp):
        raise UserError(
            f"--ep {ep} --tp {tp}: {world} ranks are not a multiple of ep·tp = {ep * tp}; start "
            f"{ep * tp} of them"
        )
    dp = world // (ep * tp)
    lane_ep = lane_positions(lanes, ep, dp, sequences)
    if groups.mpu is None:
        groups._init_tp_mesh_device(tensor_model_parallel_size=tp)
        groups.mpu = groups
    rank = dist.get_rank()
    dp_rank, ep_rank, tp_rank = grid_position(rank, ep, tp)
    # Checked before DeepSpeed builds on it: its own error does not say what is wrong.
    tp_group = bwc.bwc_tensor_model_parallel_group(groups.mpu)
    _check_ranks("tensor", tp_group, [rank - tp_rank + i for i in range(tp)])
    group_name = f"ep_size_{ep}"
    if group_name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_data_and_model_parallel(ep, mpu=groups.mpu)
    ep_group = groups._get_expert_parallel_group(group_name)
    first = dp_rank * ep * tp
    _check_ranks("expert", ep_group, [first + i * tp + tp_rank for i in range(ep)])
    whole = torch.distributed.group.WORLD
    assert whole is not None
    existing = [ep_group, tp_group, whole]
    ranks = range(world)
    size, lane_size = ep * tp, lane_ep * tp
    replica_group = group_of(rank, [ranks[i : i + size] for i in ranks[::size]], existing)
    if replica_group is not None:
        existing.append(replica_group)
    peer_step = min(lane_size, size)
    return Topology(
        ep=ep,
        tp=tp,
        dp=dp,
        ep_rank=ep_rank,
        tp_rank=tp_rank,
        dp_rank=dp_rank,
        lane_ep=lane_ep,
        ep_group=ep_group if ep > 1 else None,
        tp_group=tp_group if tp > 1 else None,
        replica_group=replica_group,
        lane_group=group_of(rank, [ranks[i : i + lane_size] for i in ranks[::lane_size]], existing),
        peer_group=group_of(
            rank,
            [ranks[i + j : i + size : peer_step] for i in ranks[::size] for j in range(peer_step)],
            existing,
        ),
    )


def group_of(
    rank: int,
    partition: list[range],
    existing: Sequence[torch.distributed.ProcessGroup],
) -> torch.distributed.ProcessGroup | None:
    """The process group of `rank`'s part of the world; one of `existing` if it has these ranks.

    Collective over the world. None for a part of one rank.
    """
    (mine,) = (list(part) for part in partition if rank in part)
    if len(mine) == 1:
        return None
    for group in existing:
        if torch.distributed.get_process_group_ranks(group) == mine:
            # All parts are alike, so every rank finds its group here or none does.
            return group
    found = [dist.new_group(list(part)) for part in partition]
    return found[next(i for i, part in enumerate(partition) if rank in part)]


def _check_ranks(kind: str, group: torch.distributed.ProcessGroup, expected: list[int]) -> None:
    found = torch.distributed.get_process_group_ranks(group)
    if found != expected:
        raise UserError(
            f"DeepSpeed already has a {kind}-parallel group of ranks {found} in this process, "
            f"this grid needs {expected}; load one grid per process, or tear the groups down first"
        )
