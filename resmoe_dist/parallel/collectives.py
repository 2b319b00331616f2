"""The collectives that dispatch is made of. All traffic of the MoE layers goes through here.

Everything is an all-to-all where the backend is gloo: there an all-to-all among 8 ranks takes about
3 ms, an all-gather 8 ms, and an all-reduce or reduce-scatter 14 ms.

Legend: P ranks of the group, R rows per rank.
"""

from __future__ import annotations

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.kernels.sums import add_up

Group = torch.distributed.ProcessGroup

# Up to here the latency of a second collective costs more than sending everything everywhere.
_WHOLE_BYTES = 1 << 18


def exchange(rows: Tensor, group: Group) -> Tensor:
    """Part p of the first dimension goes to rank p; what rank p sent here becomes part p."""
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows.contiguous(), group=group)
    return received


def exchange_ragged(
    rows: Tensor, send_sizes: list[int], receive_sizes: list[int], group: Group
) -> Tensor:
    """The same for parts of different sizes, which both sides know."""
    received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
    dist.all_to_all_single(
        received,
        rows.contiguous(),
        output_split_sizes=receive_sizes,
        input_split_sizes=send_sizes,
        group=group,
    )
    return received


def gather(rows: Tensor, group: Group) -> Tensor:
    """The rows of all ranks, in the order of the ranks: [R, …] -> [P·R, …]."""
    ranks = torch.distributed.get_world_size(group)
    if torch.distributed.get_backend(group) == "gloo":
        return exchange(rows.expand(ranks, *rows.shape), group).flatten(0, 1)
    gathered = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def sum_over(y_TH: Tensor, group: Group) -> Tensor:
    """The sum over the ranks' tensors, the same bits on every rank: [T, H] -> [T, H].

    Added in float32 in the order of the ranks and rounded once to the dtype of y. Few rows travel
    whole to every rank, in one collective. Many rows are added up in shares, in two.
    """
    ranks = torch.distributed.get_world_size(group)
    T, H = y_TH.shape
    if y_TH.nbytes <= _WHOLE_BYTES:
        return add_up(gather(y_TH, group).view(ranks, T, H))
    share = -(-T // ranks)
    padded = F.pad(y_TH, (0, 0, 0, share * ranks - T))
    parts = exchange(padded, group).view(ranks, share, H)
    return gather(add_up(parts), group)[:T]
