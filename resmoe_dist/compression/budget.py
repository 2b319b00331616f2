"""How budgets of kept entries are shared: between a centre and residuals, and over a model.

Legend: E experts of a group, I rows, D columns, S sampled entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.center import mean_center
from resmoe_dist.compression.encoding import GroupCodecs, encode_group
from resmoe_dist.compression.windows import drop_prices

# Points of a price curve: accurate to 0.01 % of the values.
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
    """What dropping one more value costs in a group, as quantiles of the prices.

    values: E·I·D. droppable: how many of them have a price; the others are free to drop. prices:
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
    """Each group's share of values to keep, so that the last one kept saves the same in all groups.

    budgets: how many values each group would keep alone. Their sum is kept. At the least error the
    price of the next drop is the same in all groups (Lagrange).
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
    # The curves have steps, and prices may be equal: the rest of the budget is spread evenly.
    kept = sum(share * curve.values for share, curve in zip(shares, curves, strict=True))
    free = sum((1 - share) * curve.values for share, curve in zip(shares, curves, strict=True))
    spread = min(1.0, (budget - kept) / free) if free > 0 else 0.0
    return [share + (1 - share) * spread for share in shares]
