"""Where the kept entries go: per expert, per group, or over the model; and how many there are.

Legend: E experts of a group, I rows, D columns, S sampled entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.center import mean_center
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.compression.windows import drop_prices

# Points of a price curve: shares read off it are right to 0.01 %.
_CURVE_POINTS = 8193
_BISECTIONS = 60


def centerless_keep(keep: float, count: int, center_share: float = 1.0) -> float:
    """The share of entries that a group of `count` experts can keep for the bytes of a centre too.

    center_share: bytes of the centre as a share of a dense matrix's.
    """
    return min(1.0, keep + center_share / count)


def center_pays(
    aligned: AlignedExperts, residual_codec: CodecSpec, center_share: float = 1.0
) -> bool:
    """Whether a joint centre loses less than keeping more entries for the same bytes.

    residual_codec: one that selects entries. center_share: see `centerless_keep`. Estimated on a
    sample of the entries, with an exact centre.
    """
    sample = aligned.as_sample()
    keep = residual_codec.keep
    assert keep is not None, "codecs that select entries have a budget"

    def error(center: str, keep: float) -> float:
        codecs = GroupCodecs(residual_codec.with_keep(keep), torch.float32)
        return encode_group(sample, codecs, center=center).squared_error

    without = centerless_keep(keep, aligned.count, center_share)
    return error("joint", keep) <= error("none", without)


@dataclass(frozen=True)
class PriceCurve:
    """What dropping one more value would cost in a group, as its quantiles.

    values: E·I·D. droppable: how many of them have a price; the others drop for free. prices:
    ascending, squared errors in the units of the experts.
    """

    values: int
    droppable: int
    prices: tuple[float, ...]

    @classmethod
    def of(cls, aligned: AlignedExperts, center: str) -> PriceCurve:
        """The curve of a group with a centre of kind `center`."""
        sample_ES, weight_S = aligned.sample, aligned.sample_weights
        droppable = aligned.count * aligned.entries
        if center == "joint":
            prices = drop_prices(sample_ES)
            droppable -= aligned.entries
        else:
            if center != "none":
                sample_ES = sample_ES - aligned.sample_of(mean_center(aligned, torch.float32))
            prices = sample_ES.square()
        if weight_S is not None:
            prices = prices * weight_S.square()
        prices = prices.flatten()
        if not prices.numel():
            return cls(aligned.count * aligned.entries, 0, (0.0,))
        prices = prices.sort().values
        last = prices.numel() - 1
        points = torch.linspace(0, last, _CURVE_POINTS, dtype=torch.float64).long()
        found = prices[points].double() * aligned.scale**2
        return cls(aligned.count * aligned.entries, droppable, tuple(found.tolist()))

    def kept_at(self, price: float) -> float:
        """How many values cost more to drop than `price`."""
        prices = torch.tensor(self.prices, dtype=torch.float64)
        share = float((prices > price).double().mean())
        return share * self.droppable


def allocate_over_model(curves: Sequence[PriceCurve], budgets: Sequence[float]) -> list[float]:
    """Each group's share of values to keep, so that a value kept saves as much error in all.

    budgets: how many values each group would keep alone; their sum is kept (Lagrange: at the least
    error the price of the next drop is the same everywhere).
    """
    budget = sum(budgets)
    low, high = 0.0, max(curve.prices[-1] for curve in curves)
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        if sum(curve.kept_at(price) for curve in curves) > budget:
            low = price
        else:
            high = price
    shares = [curve.kept_at(high) / curve.values for curve in curves]
    # Steps of the curves, and equal prices, leave a rest: it is spread evenly.
    kept = sum(share * curve.values for share, curve in zip(shares, curves, strict=True))
    free = sum((1 - share) * curve.values for share, curve in zip(shares, curves, strict=True))
    spread = min(1.0, (budget - kept) / free) if free > 0 else 0.0
    return [share + (1 - share) * spread for share in shares]


@dataclass(frozen=True)
class StoredSize:
    """What decides the stored bytes of a group.

    count: number of experts, each [rows, columns]. itemsize: bytes of a stored value.
    center_codec: None for a group without a centre. fixed: bytes that do not depend on codecs, such
    as output biases.
    """

    count: int
    rows: int
    columns: int
    itemsize: int
    residual_codec: CodecSpec
    center_codec: CodecSpec | None
    fixed: int = 0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the experts if stored dense."""
        return self.fixed + self.count * self.rows * self.columns * self.itemsize

    @property
    def center_bytes(self) -> int:
        """Upper bound of the centre's bytes."""
        return 0 if self.center_codec is None else self._bytes_of(self.center_codec)

    def bytes_at(self, keep: float | None) -> int:
        """Upper bound of the group's bytes, centre and indices included.

        keep: replaces the residual codec's budget; None for codecs without one.
        """
        codec = self.residual_codec if keep is None else self.residual_codec.with_keep(keep)
        return self.fixed + self.center_bytes + self.count * self._bytes_of(codec)

    def _bytes_of(self, spec: CodecSpec) -> int:
        return spec.codec.stored_bytes(self.rows, self.columns, spec.config, self.itemsize)


def keep_for(target_bytes: float, total_bytes: Callable[[float], int]) -> float | None:
    """The largest keep whose bytes do not exceed the target; None where even keep 0's do."""
    if total_bytes(1.0) <= target_bytes:
        return 1.0
    if total_bytes(0.0) > target_bytes:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if total_bytes(middle) <= target_bytes:
            low = middle
        else:
            high = middle
    return low
