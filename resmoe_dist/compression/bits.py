"""How many bits centres and residuals get: those that lose least at a given size.

A code of b bits leaves the share D(b) of what it codes. The residual of an expert is coded after
its centre was rounded, so it also corrects the centre's rounding:

    error_k = w_k · D(b_k) · (‖T_k W_k − C‖² + D(c) · ‖C‖²)      with a centre of c bits
    error_k = w_k · D(b_k) · ‖W_k‖²                              without

A centre is chosen where it pays for its bits, group by group; bits of experts differ, so that
sizes between whole numbers of bits can be met.

Legend: E experts of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resmoe_dist.codecs import CodecSpec

# Residuals of an expert, and centres, may have so many bits; None: no centre.
RESIDUAL_BITS = (1, 2, 3, 4, 8)
CENTER_BITS = (None, 1, 2, 3, 4, 8)
# The lowest price of a byte, as a share of the highest.
_LEAST_PRICE = 1e-24
_BISECTIONS = 100


@dataclass(frozen=True)
class GroupEnergies:
    """What a group's bits are chosen by.

    residual_E: ‖T_k W_k − C‖² with the mean C. whole_E: ‖W_k‖². center: ‖C‖², None if the group
    has to do without a centre. weight_E: of each expert's error. errors, sizes: D(b), and the bytes
    of a matrix, at each of RESIDUAL_BITS.
    """

    residual_E: tuple[float, ...]
    whole_E: tuple[float, ...]
    center: float | None
    weight_E: tuple[float, ...]
    errors: tuple[float, ...]
    sizes: tuple[int, ...]

    @classmethod
    def from_lists(cls, fields: dict[str, Any]) -> GroupEnergies:
        """From a JSON object of the fields."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**given)

    @property
    def whole(self) -> float:
        """The weighted error if all of the experts were lost."""
        return sum(w * energy for w, energy in zip(self.weight_E, self.whole_E, strict=True))

    def weighted(self, factor: float) -> GroupEnergies:
        """The same with all weights multiplied."""
        return replace(self, weight_E=tuple(factor * weight for weight in self.weight_E))

    def error(self, bits: int) -> float:
        """D(b)."""
        return self.errors[RESIDUAL_BITS.index(bits)]

    def size(self, bits: int | None) -> int:
        """Bytes of a residual or a centre."""
        return 0 if bits is None else self.sizes[RESIDUAL_BITS.index(bits)]

    def coded_E(self, center: int | None) -> Sequence[float]:
        """What is left for each residual to code."""
        if center is None or self.center is None:
            return self.whole_E
        rounding = self.error(center) * self.center
        return [residual + rounding for residual in self.residual_E]


@dataclass(frozen=True)
class GroupBits:
    """center: bits of the centre, None for no centre. residual_E: bits of each residual."""

    center: int | None
    residual_E: tuple[int, ...]


def errors_at(spec: CodecSpec) -> tuple[float, ...]:
    """What the codec leaves of a matrix at each of RESIDUAL_BITS."""
    return tuple(spec.codec.error_at(spec.config, bits) for bits in RESIDUAL_BITS)


def sizes_at(spec: CodecSpec, rows: int, columns: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of a matrix at each of RESIDUAL_BITS."""
    return tuple(
        spec.codec.stored_bytes(rows, columns, spec.with_bits(bits).config, itemsize)
        for bits in RESIDUAL_BITS
    )


def allocate_bits(groups: Sequence[GroupEnergies], target_bytes: float) -> list[GroupBits] | None:
    """The bits of each group that lose least and together take at most `target_bytes`.

    None if even the fewest bits take more.
    """

    def chosen(price: float) -> list[GroupBits]:
        return [_best_bits(energies, price) for energies in groups]

    def total(found: list[GroupBits]) -> int:
        return sum(_bytes_of(g, bits) for g, bits in zip(groups, found, strict=True))

    # Prices of a byte: at the highest, everything has the fewest bits.
    high = 1.0 + max(max(g.whole_E) * max(g.weight_E) for g in groups)
    low = high * _LEAST_PRICE
    if total(chosen(high)) > target_bytes:
        return None
    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5
        if total(chosen(price)) > target_bytes:
            low = price
        else:
            high = price
    found = chosen(high)
    _spend_rest(groups, found, target_bytes - total(found))
    return found


def error_of(energies: GroupEnergies, bits: GroupBits) -> float:
    """The weighted squared error that is expected of a group."""
    coded = zip(energies.coded_E(bits.center), energies.weight_E, bits.residual_E, strict=True)
    return sum(weight * energies.error(each) * left for left, weight, each in coded)


def _best_bits(energies: GroupEnergies, price: float) -> GroupBits:
    """What costs a group least, its errors and its bytes at a price together."""
    centers = CENTER_BITS if energies.center is not None else (None,)
    best, least = None, float("inf")
    for center in centers:
        bits_E, cost = [], price * energies.size(center)
        for coded, weight in zip(energies.coded_E(center), energies.weight_E, strict=True):
            costs = {
                bits: weight * energies.error(bits) * coded + price * energies.size(bits)
                for bits in RESIDUAL_BITS
            }
            bits = min(costs, key=lambda b: (costs[b], b))
            bits_E.append(bits)
            cost += costs[bits]
        if cost < least:
            best, least = GroupBits(center, tuple(bits_E)), cost
    assert best is not None
    return best


def _bytes_of(energies: GroupEnergies, bits: GroupBits) -> int:
    return energies.size(bits.center) + sum(energies.size(each) for each in bits.residual_E)


def _spend_rest(groups: Sequence[GroupEnergies], found: list[GroupBits], rest: float) -> None:
    """Give single experts the next number of bits while it fits, those first that gain most."""
    while True:
        best = None
        for group, (energies, bits) in enumerate(zip(groups, found, strict=True)):
            coded_E = energies.coded_E(bits.center)
            for expert, has in enumerate(bits.residual_E):
                more = next((b for b in RESIDUAL_BITS if b > has), None)
                if more is None or energies.size(more) - energies.size(has) > rest:
                    continue
                cost = energies.size(more) - energies.size(has)
                lost = energies.weight_E[expert] * coded_E[expert]
                gain = lost * (energies.error(has) - energies.error(more)) / cost
                if best is None or gain > best[0]:
                    best = gain, group, expert, more, cost
        if best is None:
            return
        _, group, expert, more, cost = best
        residual = list(found[group].residual_E)
        residual[expert] = more
        found[group] = GroupBits(found[group].center, tuple(residual))
        rest -= cost
