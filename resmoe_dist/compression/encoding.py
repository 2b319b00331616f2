"""Residuals of a group against its centre, and what was lost.

Legend: N experts of the group, I rows, D columns, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from resmoe_dist.codecs import EncodedResidual
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.center import joint_center, mean_center
from resmoe_dist.compression.selection import OrderStatistic, order_statistic
from resmoe_dist.compression.threads import in_parallel

_MAX_ALTERNATIONS = 10
# Alternation stops when a round gains less than this share of the error.
_ALTERNATION_GAIN = 1e-3
# Entries of a row with a budget of their own in a balanced mask.
BALANCED_RUN = 64


@dataclass(frozen=True)
class Loss:
    """Of one expert: ‖T_k W_k − restored_k‖² and ‖W_k‖², the same with weights (where there are
    any), and how many of the residual's entries the codec kept."""

    squared_error: float
    squared_norm: float
    weighted_squared_error: float
    weighted_squared_norm: float
    kept: int


@dataclass(frozen=True)
class Encoded:
    """A group after encoding: center_ID in the stored dtype (None: no centre), and per expert its
    residual and what it lost, with everything rounded as stored."""

    center_ID: Tensor | None
    residuals: list[EncodedResidual]
    losses: list[Loss]

    @property
    def squared_error(self) -> float:
        """Of the whole group, weighted: what the choices minimise."""
        return sum(loss.weighted_squared_error for loss in self.losses)


def encode_group(
    aligned: AlignedExperts,
    codec: type[EncodedResidual],
    *,
    center: str,
    keep: float,
    allocate: str,
    dtype: torch.dtype,
) -> Encoded:
    """Centre and residuals of aligned experts.

    center: `joint`, `barycenter`, `mean` (the last two are the same average; with `mean` the caller
    has not aligned) or `none`. keep: share of residual entries to keep, of each expert's own where
    allocate is `expert`, of each BALANCED_RUN entries of a row where it is `block`, else of the
    group's. dtype: of stored values.
    """
    if not codec.uses_center or center == "none":
        center_ID = None
    elif center != "joint":
        center_ID = mean_center(aligned, dtype)
    elif codec.chooses_entries:
        center_ID = joint_center(aligned, keep, dtype)
    else:
        return _alternate(aligned, codec, keep, dtype)
    if codec.chooses_entries:
        return _encode_entries(aligned, center_ID, codec, keep, allocate, dtype)
    return _encode_matrices(aligned, center_ID, codec, keep, dtype)


def _encode_entries(
    aligned: AlignedExperts,
    center_ID: Tensor | None,
    codec: type[EncodedResidual],
    keep: float,
    allocate: str,
    dtype: torch.dtype,
) -> Encoded:
    """Keep the entries that are furthest from the centre as it is stored, block by block."""
    everyone = list(range(aligned.count))
    blocks_each = len(list(aligned.blocks(1)))
    residuals, losses = [], []
    for experts in [everyone] if allocate == "group" else [[k] for k in everyone]:
        balanced = allocate == "block"
        last = None if balanced else _last_dropped(aligned, center_ID, experts, keep)

        def encode(
            numbered: tuple[int, tuple[int, slice]], last: OrderStatistic | None = last
        ) -> tuple[EncodedResidual, Loss]:
            number, (k, rows) = numbered
            expert_BD = aligned.expert_rows(k, rows)
            residual_BD = _residual(expert_BD, center_ID, rows)
            away_BD = _away(aligned, residual_BD, rows)
            if last is None:
                mask_BD = balanced_mask(away_BD, keep)
            else:
                ties = last.ties[number] if last.value else away_BD.numel()
                mask_BD = _beyond(away_BD, last.value, ties)
            part = codec.encode(residual_BD, keep=keep, dtype=dtype, mask_ID=mask_BD)
            lost = _loss(aligned, expert_BD, residual_BD, part, rows, int(mask_BD.sum()))
            return part.cpu(), lost

        encoded = in_parallel(
            encode, enumerate(_blocks_of(aligned, experts)), device=aligned.device
        )
        for _ in experts:
            parts, lost = zip(*islice(encoded, blocks_each), strict=True)
            residuals.append(codec.join_rows(list(parts)))
            losses.append(_total(lost))
    return Encoded(center_ID, residuals, losses)


def balanced_mask(away_BD: Tensor, keep: float) -> Tensor:
    """In every run of BALANCED_RUN entries of a row the ⌊keep·run⌋ that are furthest away.

    So every run of whole length has equally many values, zeros among them if need be.
    """
    mask_BD = torch.zeros_like(away_BD, dtype=torch.bool)
    for first in range(0, away_BD.shape[1], BALANCED_RUN):
        run = slice(first, first + BALANCED_RUN)
        count = int(keep * away_BD[:, run].shape[1])
        mask_BD[:, run].scatter_(1, away_BD[:, run].topk(count, sorted=False).indices, True)
    return mask_BD


def _blocks_of(aligned: AlignedExperts, experts: list[int]) -> Iterator[tuple[int, slice]]:
    return ((k, rows) for k in experts for rows in aligned.blocks(1))


def _last_dropped(
    aligned: AlignedExperts, center_ID: Tensor | None, experts: list[int], keep: float
) -> OrderStatistic:
    """The weighted magnitude beyond which ⌊keep·n⌋ residual entries lie, of all those `experts`'.

    It is zero where no entry that is not has to be dropped: zeros are never kept.
    """

    def magnitudes(block: tuple[int, slice]) -> Tensor:
        k, rows = block
        residual_BD = _residual(aligned.expert_rows(k, rows), center_ID, rows)
        return _away(aligned, residual_BD, rows).flatten()

    total = len(experts) * aligned.entries
    drops = total - int(keep * total)
    if not drops:
        return OrderStatistic(0.0, [])
    sample_NS = aligned.sample[experts]
    if center_ID is not None:
        sample_NS = sample_NS - aligned.sample_of(center_ID)
    if aligned.sample_weights is not None:
        sample_NS = sample_NS * aligned.sample_weights
    return order_statistic(
        sample_NS.abs(),
        magnitudes,
        lambda: _blocks_of(aligned, experts),
        total,
        drops,
        device=aligned.device,
    )


def _residual(expert_BD: Tensor, center_ID: Tensor | None, rows: slice) -> Tensor:
    """Against the centre as it is stored: its rounding is made good in the residual."""
    return expert_BD if center_ID is None else expert_BD - center_ID[rows].to(expert_BD)


def _away(aligned: AlignedExperts, residual_BD: Tensor, rows: slice) -> Tensor:
    return _weigh(aligned, residual_BD / aligned.scale, rows).abs()


def _weigh(aligned: AlignedExperts, values_BD: Tensor, rows: slice) -> Tensor:
    weight_BD = aligned.block_weights(rows)
    return values_BD if weight_BD is None else values_BD * weight_BD


def _beyond(away_BD: Tensor, threshold: float, drop: int) -> Tensor:
    """Mask of what is kept: beyond the threshold, or equal to it but for the first `drop`."""
    mask_BD = away_BD > threshold
    ties_BD = away_BD == threshold
    if int(ties_BD.sum()) > drop:
        mask_BD |= ties_BD & (ties_BD.flatten().cumsum(0) > drop).view_as(ties_BD)
    return mask_BD


def _encode_matrices(
    aligned: AlignedExperts,
    center_ID: Tensor | None,
    codec: type[EncodedResidual],
    keep: float,
    dtype: torch.dtype,
) -> Encoded:
    """Encode one whole residual after the other."""
    residuals, losses = [], []
    everything = slice(0, aligned.experts_EID.shape[1])
    for k in range(aligned.count):
        expert_ID = aligned.expert_rows(k, everything)
        residual_ID = _residual(expert_ID, center_ID, everything)
        residual = codec.encode(residual_ID, keep=keep, dtype=dtype)
        kept = sum(tensor.numel() for tensor in residual.tensors().values())
        losses.append(_loss(aligned, expert_ID, residual_ID, residual, everything, kept))
        residuals.append(residual.cpu())
    return Encoded(center_ID, residuals, losses)


def _alternate(
    aligned: AlignedExperts, codec: type[EncodedResidual], keep: float, dtype: torch.dtype
) -> Encoded:
    """C ← mean over k of (T_k W_k − decode(R_k)), repeated while the error falls.

    Given the decoded residuals that mean is the best centre; the best round is returned, so the
    result is never worse than the plain barycentre's.
    """
    everything = slice(0, aligned.experts_EID.shape[1])
    best = _encode_matrices(aligned, mean_center(aligned, dtype), codec, keep, dtype)
    for _ in range(_MAX_ALTERNATIONS):
        center_ID = torch.zeros(aligned.experts_EID.shape[1:])
        for k, residual in enumerate(best.residuals):
            center_ID += aligned.expert_rows(k, everything).cpu() / aligned.count
            center_ID -= residual.decode().float() / aligned.count
        trial = _encode_matrices(aligned, center_ID.to(dtype), codec, keep, dtype)
        gained = best.squared_error - trial.squared_error
        enough = gained > _ALTERNATION_GAIN * best.squared_error
        if gained > 0:
            best = trial
        if not enough:
            break
    return best


def _loss(
    aligned: AlignedExperts,
    expert_BD: Tensor,
    residual_BD: Tensor,
    part: EncodedResidual,
    rows: slice,
    kept: int,
) -> Loss:
    lost_BD = residual_BD - part.decode().float()
    plain = _square(lost_BD), _square(expert_BD)
    if aligned.weights is None:
        return Loss(*plain, *plain, kept)
    weighted = (
        _square(_weigh(aligned, lost_BD, rows)),
        _square(_weigh(aligned, expert_BD, rows)),
    )
    return Loss(*plain, *weighted, kept)


def _square(matrix_BD: Tensor) -> float:
    """‖·‖², in float64: squares of very large weights leave float32."""
    return float(torch.linalg.vector_norm(matrix_BD, dtype=torch.float64)) ** 2


def _total(parts: Sequence[Loss]) -> Loss:
    return Loss(
        squared_error=sum(part.squared_error for part in parts),
        squared_norm=sum(part.squared_norm for part in parts),
        weighted_squared_error=sum(part.weighted_squared_error for part in parts),
        weighted_squared_norm=sum(part.weighted_squared_norm for part in parts),
        kept=sum(part.kept for part in parts),
    )
