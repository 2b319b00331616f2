"""The centre of a group: the mean of the aligned experts, or optimal given the kept entries.

Legend: E experts of the group, I rows, D columns, B rows of a block, C entries of a block,
S sampled entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.selection import OrderStatistic, order_statistic
from resmoe_dist.compression.threads import in_parallel
from resmoe_dist.compression.windows import (
    drop_prices,
    drops_per_entry,
    num_priced_drops,
    window_means,
)

# The exact centre's work grows with E², its advantage shrinks. At 64 experts it takes 1.4 times as
# long as the trimmed mean, and its error is 0.2 % lower at keep 0.25 (3 % lower at 0.5).
MAX_EXACT_EXPERTS = 64
_TRIMMING_ROUNDS = 8


# Values [E, C] and the weights [C] of their entries, or None -> a centre [C].
BlockCenter = Callable[[Tensor, "Tensor | None"], Tensor]


def mean_center(experts: AlignedExperts, dtype: torch.dtype) -> Tensor:
    """The mean of the aligned experts [I, D], stored as `dtype` (paper 001, equation 4)."""
    return _center_per_block(experts, dtype, lambda values_EC, _: _mean(values_EC))


def joint_center(
    experts: AlignedExperts,
    keep: float,
    dtype: torch.dtype,
    *,
    max_exact_experts: int = MAX_EXACT_EXPERTS,
) -> Tensor:
    """The centre [I, D] with the least error, given that the share `keep` of residuals is kept.

    The error is weighted if `experts` have weights. The centre is exact (`windowed_center`) for up
    to `max_exact_experts` experts, and approximate (`trimmed_center`) for more.
    """
    if experts.count <= max_exact_experts:
        return windowed_center(experts, keep, dtype)
    return trimmed_center(experts, keep, dtype)


def windowed_center(experts: AlignedExperts, keep: float, dtype: torch.dtype) -> Tensor:
    """The optimal centre [I, D]; see `windows`.

    The weight of an entry scales its prices. It does not change the mean of its window.
    """
    drops = num_priced_drops(keep, experts.count, experts.entries)
    last_drop = OrderStatistic(0.0, [])
    if drops > 0:
        last_drop = order_statistic(
            _weighted_prices(experts.sample, experts.sample_weights),
            lambda rows: _weighted_prices(*_scaled_block(experts, rows)).flatten(),
            experts.blocks,
            (experts.count - 1) * experts.entries,
            drops,
            device=experts.device,
        )

    def center(numbered_rows: tuple[int, slice]) -> tuple[slice, Tensor]:
        number, rows = numbered_rows
        values_EC, weight_C = _scaled_block(experts, rows)
        # All drops with price 0 are made.
        ties = last_drop.ties[number] if last_drop.value else values_EC.numel()
        drops_C = drops_per_entry(_weighted_prices(values_EC, weight_C), last_drop.value, ties)
        return rows, window_means(values_EC, drops_C)

    parts = in_parallel(center, enumerate(experts.blocks()), device=experts.device)
    return _join_blocks(experts, dtype, parts)


def _weighted_prices(values_EC: Tensor, weight_C: Tensor | None) -> Tensor:
    prices_EC = drop_prices(values_EC)
    return prices_EC if weight_C is None else prices_EC * weight_C.square()


def trimmed_center(experts: AlignedExperts, keep: float, dtype: torch.dtype) -> Tensor:
    """An iterated trimmed mean [I, D]: at each entry, the mean of the values near the centre.

    Values are near if their weighted distance is at most a threshold. The threshold comes from the
    sample: it is exceeded by the share `keep` of the distances.
    """
    sample_ES, weight_S = experts.sample, experts.sample_weights
    dropped = max(1, round((1 - keep) * sample_ES.numel()))
    center_S = _mean(sample_ES)
    for _ in range(_TRIMMING_ROUNDS):
        distance_ES = _weighted(sample_ES - center_S, weight_S).abs()
        threshold = math.inf
        if dropped < sample_ES.numel():
            threshold = float(distance_ES.flatten().kthvalue(dropped).values)
        center_S = _trimmed_mean(sample_ES, center_S, weight_S, threshold)

    def center(values_EC: Tensor, weight_C: Tensor | None) -> Tensor:
        center_C = _mean(values_EC)
        for _ in range(_TRIMMING_ROUNDS):
            center_C = _trimmed_mean(values_EC, center_C, weight_C, threshold)
        return center_C

    return _center_per_block(experts, dtype, center)


def _trimmed_mean(
    values_EC: Tensor, center_C: Tensor, weight_C: Tensor | None, threshold: float
) -> Tensor:
    """Mean [C] of the values within `threshold` of the centre; `center_C` if no value is."""
    deviation_EC = values_EC - center_C
    near_EC = _weighted(deviation_EC, weight_C).abs() <= threshold
    return center_C + _sum(deviation_EC * near_EC) / near_EC.sum(0).clamp(min=1)


def _mean(values_EC: Tensor) -> Tensor:
    """Mean [C] of E values. The mean of equal values is exactly that value."""
    return values_EC[0] + _sum(values_EC - values_EC[0]) / len(values_EC)


def _sum(values_EC: Tensor) -> Tensor:
    """Sum [C] in the order of the experts, so that rounding does not depend on the block size."""
    total_C = values_EC[0].clone()
    for value_C in values_EC[1:]:
        total_C += value_C
    return total_C


def _weighted(values_EC: Tensor, weight_C: Tensor | None) -> Tensor:
    return values_EC if weight_C is None else values_EC * weight_C


def _center_per_block(
    experts: AlignedExperts, dtype: torch.dtype, block_center: BlockCenter
) -> Tensor:
    """A centre [I, D], computed for each block of rows independently."""

    def center(rows: slice) -> tuple[slice, Tensor]:
        return rows, block_center(*_scaled_block(experts, rows))

    parts = in_parallel(center, experts.blocks(), device=experts.device)
    return _join_blocks(experts, dtype, parts)


def _scaled_block(experts: AlignedExperts, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Values [E, C] of a range of rows, divided by `experts.scale`, and weights [C] or None."""
    values_EC = (experts.block(rows) / experts.scale).flatten(1)
    weight_BD = experts.block_weights(rows)
    return values_EC, None if weight_BD is None else weight_BD.flatten()


def _join_blocks(
    experts: AlignedExperts, dtype: torch.dtype, parts: Iterable[tuple[slice, Tensor]]
) -> Tensor:
    """A centre [I, D] from ranges of rows and their centres [C], divided by `experts.scale`."""
    center_ID = torch.empty(experts.experts_EID.shape[1:], dtype=dtype)
    for rows, center_C in parts:
        center_BD = center_C.view(-1, center_ID.shape[1])
        center_ID[rows] = (center_BD * experts.scale).to(dtype)
    return center_ID
