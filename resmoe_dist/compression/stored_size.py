"""The bytes that a group will take, and the budget that meets a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resmoe_dist.codecs import CodecSpec

_BISECTIONS = 60


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

        keep: replaces the budget of a residual codec that has one; None leaves it.
        """
        codec = self.residual_codec
        if keep is not None and codec.keep is not None:
            codec = codec.with_keep(keep)
        return self.fixed + self.center_bytes + self.count * self._bytes_of(codec)

    def _bytes_of(self, spec: CodecSpec) -> int:
        return spec.codec.stored_bytes(self.rows, self.columns, spec.config, self.itemsize)


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
