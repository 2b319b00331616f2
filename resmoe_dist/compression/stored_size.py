"""The bytes that a group will take, and the budget that meets a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from resmoe_dist.codecs import CodecSpec

# What a budget takes away: entries of the matrices, rows of the experts, or experts.
Reduces = Literal["entries", "rows", "experts"]

_BISECTIONS = 60


@dataclass(frozen=True)
class StoredSize:
    """What decides the stored bytes of a group.

    count: number of experts, each [rows, columns]. itemsize: bytes of a stored value.
    center_codec: None for a group without a centre. bias_bytes: of one expert's output bias.
    reduces: what a budget takes away. Unless that is entries, the residual codec has no budget.
    entries_kept: the share of its entries that each stored expert keeps beside that: a budget of
    experts then allows more of them. center_shares_keep: whether the residuals' budget is the
    centre's too; otherwise the centre's options decide its bytes.
    """

    count: int
    rows: int
    columns: int
    itemsize: int
    residual_codec: CodecSpec
    center_codec: CodecSpec | None
    bias_bytes: int = 0
    reduces: Reduces = "entries"
    entries_kept: float = 1.0
    center_shares_keep: bool = False

    @property
    def dense_bytes(self) -> int:
        """Bytes of the experts if stored dense."""
        return self.count * (self.bias_bytes + self.rows * self.columns * self.itemsize)

    def center_bytes_at(self, keep: float | None) -> int:
        """Upper bound of the centre's bytes. keep: as in `bytes_at`."""
        codec = self.center_codec
        if codec is None:
            return 0
        if keep is not None and self.center_shares_keep:
            codec = codec.with_keep(keep)
        return self._bytes_of(codec, self.rows)

    def bytes_at(self, keep: float | None) -> int:
        """Upper bound of the group's bytes, centre and indices included.

        keep: replaces the budget of a residual codec that has one; None leaves it, or keeps all
        rows and experts.
        """
        codec, count, rows = self.residual_codec, self.count, self.rows
        if keep is not None:
            if codec.keep is not None:
                codec = codec.with_keep(keep)
            if self.reduces == "experts":
                count = share_of(count, min(1.0, keep / self.entries_kept))
            rows = share_of(rows, keep) if self.reduces == "rows" else rows
        return self.center_bytes_at(keep) + count * (self.bias_bytes + self._bytes_of(codec, rows))

    def _bytes_of(self, spec: CodecSpec, rows: int) -> int:
        return spec.codec.stored_bytes(rows, self.columns, spec.config, self.itemsize)


def share_of(count: int, keep: float) -> int:
    """How many of `count` rows or experts a budget keeps: at least one, rounded down."""
    return max(1, int(keep * count + 1e-9))


def keep_for(target_bytes: float, total_bytes: Callable[[float], int]) -> float | None:
    """The largest keep whose bytes do not exceed the target; None if keep 0 exceeds it."""
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
