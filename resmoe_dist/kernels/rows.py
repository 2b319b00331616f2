"""What the kernels work on: rows of an expert, dense, pruned, or a sum of the two.

Legend: S rows (a shard of the I of an expert), D columns, P = ⌈D/8⌉ bytes of bitmap per row,
V kept values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompressedRows:
    """Rows [S, D] of a design matrix: `center` plus a pruned residual; either may be None.

    center: [S, D]. bitmap: [S, P] uint8, lowest bit first. values: [V], the entries of the set
    bits in row order. row_offsets: [S + 1] int32 or int64, where the values of each row begin.
    """

    center: Tensor | None = None
    bitmap: Tensor | None = None
    values: Tensor | None = None
    row_offsets: Tensor | None = None

    @property
    def count(self) -> int:
        """S."""
        return len(self.bitmap if self.center is None else self.center)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return (self.values if self.center is None else self.center).dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return (self.values if self.center is None else self.center).device
