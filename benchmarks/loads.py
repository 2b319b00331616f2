"""What the experts of each rank compute: how much of it is padding, and how uneven it is.

Read from what the experts modules are given:

    ours           routed copies, by expert
    transformers   rows with the number of a local expert each; another number is not computed
    AutoEP         rows sorted by expert, and how many each has; rows of zeros are padding
    DeepSpeed      [groups, local experts, capacity, H]; rows of zeros are padding

A rank without a sequence runs another's, and an empty rank of transformers' all-to-all runs a row
of zeros. Both are padding too.

Legend: L local experts, R rows, H hidden, K experts per token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.stages import LayerParts
from resmoe_dist.routing import RoutedTokens


class ExpertLoad(NamedTuple):
    """One call of a rank's experts: by local expert the rows computed, and those that are copies of
    a token."""

    computed: list[int]
    copies: list[int]


def expert_loads(call: Callable[[], object], layers: Iterable[LayerParts]) -> list[ExpertLoad]:
    """The load of every call of the layers' experts while `call` runs, in order."""
    found: list[ExpertLoad] = []
    with ExitStack() as stack:
        for parts in layers:
            hook = parts.experts.register_forward_pre_hook(
                lambda module, inputs: found.append(load_of(module, inputs))
            )
            stack.callback(hook.remove)
        call()
    return found


def load_of(experts: nn.Module, inputs: tuple) -> ExpertLoad:
    """The load of one call. inputs: as the forward of each library's experts takes them."""
    first, *others = inputs
    if isinstance(first, RoutedTokens):
        counts = first.offsets_L.diff().tolist()
        return ExpertLoad(counts, counts)
    if len(others) >= 2:
        number = int(experts.num_experts)  # type: ignore[arg-type]
        index_RK, real_R = others[0], _has_values(first)
        local_RK = (index_RK >= 0) & (index_RK < number)
        return ExpertLoad(
            _count(index_RK[local_RK], number),
            _count(index_RK[local_RK & real_R.unsqueeze(1)], number),
        )
    if others:
        sizes = others[0].tolist()
        parts = _has_values(first)[: sum(sizes)].split(sizes)
    else:
        parts = _has_values(first).transpose(0, 1).flatten(1).unbind()
    return ExpertLoad([len(part) for part in parts], [int(part.sum()) for part in parts])


def _has_values(rows: Tensor) -> Tensor:
    """Which rows of [..., H] are not zero: [...]."""
    return (rows != 0).any(-1)


def _count(index_N: Tensor, number: int) -> list[int]:
    return torch.bincount(index_N.flatten(), minlength=number).tolist()


def padding_factor(
    calls: Sequence[Sequence[ExpertLoad]], copies_of_batch: int, ranks_per_copy: int
) -> float:
    """Rows computed that are no copy of the batch's tokens / those that are.

    calls: of each layer, the loads of all ranks. copies_of_batch: tokens · K of one layer.
    ranks_per_copy: tensor-parallel ranks that each compute a part of every copy.
    """
    computed = sum(sum(load.computed) for ranks in calls for load in ranks) / ranks_per_copy
    return computed / (copies_of_batch * len(calls)) - 1


def imbalance(calls: Sequence[Sequence[ExpertLoad]]) -> dict[str, float]:
    """The largest number of routed copies / the mean, over `experts` and over `ranks`.

    1 is even. The mean over the layers, each of which has the loads of all ranks.
    """
    by_expert = [[n for load in ranks for n in load.copies] for ranks in calls]
    by_rank = [[sum(load.copies) for load in ranks] for ranks in calls]
    return {
        "experts": statistics.fmean(max(each) / statistics.fmean(each) for each in by_expert),
        "ranks": statistics.fmean(max(each) / statistics.fmean(each) for each in by_rank),
    }
