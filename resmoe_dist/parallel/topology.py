"""The grid of ranks: world = dp · ep · tp, rank = (dp_rank · ep + ep_rank) · tp + tp_rank.

Tensor-parallel ranks are neighbours and hold row ranges of the same experts. The ranks of one
expert-parallel group own different experts of a layer. A *lane* is the ranks that carry one batch
together, here a tensor-parallel group: lanes carry different sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed.comm as dist
import torch
from deepspeed.utils import bwc, groups

from resmoe_dist.errors import UserError


@dataclass(frozen=True)
class Topology:
    """This rank's place in the grid. A group of a single rank is None."""

    ep: int = 1
    tp: int = 1
    dp: int = 1
    ep_rank: int = 0
    tp_rank: int = 0
    dp_rank: int = 0
    ep_group: torch.distributed.ProcessGroup | None = None
    tp_group: torch.distributed.ProcessGroup | None = None

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return self.dp * self.ep

    @property
    def lane(self) -> int:
        """This rank's lane."""
        return self.dp_rank * self.ep + self.ep_rank

    def owned_experts(self, num_experts: int) -> range:
        """The experts of a layer that this rank's expert-parallel position owns."""
        return owned_experts(num_experts, self.ep_rank, self.ep)


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


def build_topology(ep: int, tp: int) -> Topology:
    """Build the grid's process groups through DeepSpeed; collective over the world.

    `deepspeed.init_distributed` must have run. Groups of an existing model-parallel unit
    (`deepspeed.utils.groups.mpu`) are used as they are.

    Raises UserError if the world is not a multiple of ep·tp, or if DeepSpeed already has groups of
    another grid in this process (it caches them by name, which does not include TP).
    """
    world = dist.get_world_size()
    if world % (ep * tp):
        raise UserError(
            f"--ep {ep} --tp {tp}: {world} ranks are not a multiple of ep·tp = {ep * tp}; start "
            f"{ep * tp} of them"
        )
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
    return Topology(
        ep=ep,
        tp=tp,
        dp=world // (ep * tp),
        ep_rank=ep_rank,
        tp_rank=tp_rank,
        dp_rank=dp_rank,
        ep_group=ep_group if ep > 1 else None,
        tp_group=tp_group if tp > 1 else None,
    )


def _check_ranks(kind: str, group: torch.distributed.ProcessGroup, expected: list[int]) -> None:
    found = torch.distributed.get_process_group_ranks(group)
    if found != expected:
        raise UserError(
            f"DeepSpeed already has a {kind}-parallel group of ranks {found} in this process, "
            f"this grid needs {expected}; load one grid per process, or tear the groups down first"
        )
