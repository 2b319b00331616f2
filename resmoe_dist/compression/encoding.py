"""Encode a group: its centre, its residuals, and what was lost.

Legend: E experts of the group, I rows, D columns, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from resmoe_dist.codecs import DENSE, CodecSpec, EncodedMatrix, Moments
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.center import joint_center, mean_center
from resmoe_dist.compression.losses import Loss, measure_loss, sum_losses
from resmoe_dist.compression.masks import (
    balanced_mask,
    expert_blocks,
    keep_mask,
    last_dropped_magnitude,
    residual_rows,
    weighted_magnitude,
)
from resmoe_dist.compression.selection import OrderStatistic
from resmoe_dist.compression.stages import stage
from resmoe_dist.compression.threads import in_parallel

_MAX_ALTERNATIONS = 10
# Alternation stops when a round gains less than this share of the error.
_ALTERNATION_GAIN = 1e-3

# Second moments of what an expert of the group multiplies, by its place in the group.
MomentsOf = Callable[[int], Moments]


@dataclass(frozen=True)
class Encoded:
    """A group as it will be stored.

    center: None if the group has none. residuals and losses: one per expert. Losses include all
    rounding.
    """

    center: EncodedMatrix | None
    residuals: list[EncodedMatrix]
    losses: list[Loss]

    @property
    def squared_error(self) -> float:
        """Weighted error of the whole group, which the choices minimise."""
        return sum(loss.weighted_squared_error for loss in self.losses)


@dataclass(frozen=True)
class GroupCodecs:
    """How a group is stored.

    residual: codec of the residuals; its `keep` is the share of entries kept. dtype: of stored
    values. center: codec of the centre, None for a group without one. budget: the share that was
    asked for; methods whose codec keeps all entries spend it on fewer rows or experts.
    projections: weight matrices of an expert, for methods that store each by itself.
    """

    residual: CodecSpec
    dtype: torch.dtype
    center: CodecSpec | None = DENSE
    budget: float | None = None
    projections: int = 3


def encode_group(
    aligned: AlignedExperts,
    codecs: GroupCodecs,
    *,
    center: str,
    allocate: str = "group",
    moments: MomentsOf | None = None,
    residual_bits: Sequence[int] | None = None,
) -> Encoded:
    """Choose and encode the centre of aligned experts, and encode the residuals.

    center: `joint`, `barycenter`, `mean` (the last two are the same average; with `mean` the
    experts are not aligned), or `none`. allocate: for codecs that select entries, what has one
    budget of kept entries: the `group`, each `block` of BALANCED_RUN entries of a row, or each
    expert (any other value). moments: of aligned experts, for codecs that use them.
    residual_bits: of each residual, for codecs that spend bits.
    """
    selects = codecs.residual.codec.selects_entries
    encoded_center = None
    if center == "joint" and not selects and not codecs.residual.codec.spends_bits:
        return _alternate(aligned, codecs)
    if center == "joint" and selects:
        keep = _budget(codecs)
        encoded_center = _encode_center(aligned, codecs, partial(joint_center, aligned, keep))
    elif center != "none":
        encoded_center = _encode_center(aligned, codecs, partial(mean_center, aligned))
    if selects:
        return _encode_entries(aligned, encoded_center, codecs, allocate)
    return _encode_matrices(aligned, encoded_center, codecs, moments, residual_bits)


@stage("center")
def _encode_center(
    aligned: AlignedExperts, codecs: GroupCodecs, make_center: Callable[[torch.dtype], Tensor]
) -> EncodedMatrix:
    """Encode the centre [I, D] that `make_center` returns in the dtype it is given."""
    spec, dtype = codecs.center, codecs.dtype
    assert spec is not None, "a group with a centre has a codec for it"
    if spec.codec.is_dense:
        return spec.codec.encode(make_center(dtype), spec.config, dtype)
    center_ID = make_center(torch.float32).to(aligned.device)
    return spec.codec.encode(center_ID, spec.config, dtype).cpu()


def _budget(codecs: GroupCodecs) -> float:
    keep = codecs.residual.keep
    assert keep is not None, "a codec that selects entries has a budget"
    return keep


def _encode_entries(
    aligned: AlignedExperts, center: EncodedMatrix | None, codecs: GroupCodecs, allocate: str
) -> Encoded:
    """Keep the entries that are furthest from the stored centre, block by block."""
    spec, keep = codecs.residual, _budget(codecs)
    center_ID = None if center is None else center.decode()
    all_experts = list(range(aligned.count))
    blocks_per_expert = len(list(aligned.blocks(1)))
    residuals: list[EncodedMatrix] = []
    losses: list[Loss] = []
    for experts in [all_experts] if allocate == "group" else [[k] for k in all_experts]:
        last = None
        if allocate != "block":
            last = last_dropped_magnitude(aligned, center_ID, experts, keep)

        def encode(
            numbered: tuple[int, tuple[int, slice]], last: OrderStatistic | None = last
        ) -> tuple[EncodedMatrix, Loss]:
            number, (k, rows) = numbered
            expert_BD = aligned.expert_rows(k, rows)
            residual_BD = residual_rows(expert_BD, center_ID, rows)
            magnitude_BD = weighted_magnitude(aligned, residual_BD, rows)
            if last is None:
                mask_BD = balanced_mask(magnitude_BD, keep)
            else:
                ties = last.ties[number] if last.value else magnitude_BD.numel()
                mask_BD = keep_mask(magnitude_BD, last.value, ties)
            part = spec.codec.encode(residual_BD, spec.config, codecs.dtype, mask_BD)
            kept = int(mask_BD.sum())
            lost = measure_loss(aligned, expert_BD, residual_BD, part, rows, kept)
            return part.cpu(), lost

        encoded = in_parallel(
            encode, enumerate(expert_blocks(aligned, experts)), device=aligned.device
        )
        for _ in experts:
            parts, lost = zip(*islice(encoded, blocks_per_expert), strict=True)
            residuals.append(spec.codec.join_rows(list(parts)))
            losses.append(sum_losses(lost))
    return Encoded(center, residuals, losses)


def _encode_matrices(
    aligned: AlignedExperts,
    center: EncodedMatrix | None,
    codecs: GroupCodecs,
    moments: MomentsOf | None = None,
    residual_bits: Sequence[int] | None = None,
) -> Encoded:
    """Encode one whole residual after the other."""
    center_ID = None if center is None else center.decode()
    residuals, losses = [], []
    for k in range(aligned.count):
        spec = codecs.residual
        if residual_bits is not None:
            spec = spec.with_bits(residual_bits[k])
        expert_ID = aligned.expert_rows(k, slice(None))
        residual_ID = residual_rows(expert_ID, center_ID, slice(None))
        residual = spec.codec.encode(
            residual_ID,
            spec.config,
            codecs.dtype,
            moments=None if moments is None else moments(k),
        )
        kept = sum(tensor.numel() for tensor in residual.tensors().values())
        losses.append(measure_loss(aligned, expert_ID, residual_ID, residual, slice(None), kept))
        residuals.append(residual.cpu())
    return Encoded(center, residuals, losses)


def _alternate(aligned: AlignedExperts, codecs: GroupCodecs) -> Encoded:
    """C ← mean over k of (T_k W_k − decode(R_k)), repeated while the error falls.

    Given the decoded residuals, that mean is the best centre. The best round is returned, so the
    result is never worse than the plain barycentre's.
    """
    center = _encode_center(aligned, codecs, partial(mean_center, aligned))
    best = _encode_matrices(aligned, center, codecs)
    for _ in range(_MAX_ALTERNATIONS):
        center_ID = _mean_without_residuals(aligned, best.residuals)
        center = _encode_center(aligned, codecs, center_ID.to)
        trial = _encode_matrices(aligned, center, codecs)
        gained = best.squared_error - trial.squared_error
        enough = gained > _ALTERNATION_GAIN * best.squared_error
        if gained > 0:
            best = trial
        if not enough:
            break
    return best


def _mean_without_residuals(aligned: AlignedExperts, residuals: list[EncodedMatrix]) -> Tensor:
    """The mean [I, D] over k of T_k W_k − decode(R_k), float32."""
    center_ID = torch.zeros(aligned.experts_EID.shape[1:])
    for k, residual in enumerate(residuals):
        center_ID += aligned.expert_rows(k, slice(None)).cpu() / aligned.count
        center_ID -= residual.decode().float() / aligned.count
    return center_ID
