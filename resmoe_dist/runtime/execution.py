"""How the experts of a layer are run: which of the ways to compute C + R, and with what memory.

restore   rebuild each expert's rows in a reused workspace, then dense products (paper 000,
          algorithm 2): the least work per token, once for every expert
shared    the centre's products once per token, the residual's per copy, nothing restored:
          reads the fewest bytes
tiled     each expert's rows restored a few at a time inside the product, never to memory
cached    as `restore`, restored experts kept under a byte budget
auto      `shared`, `tiled` or `restore`, whichever the measured costs of this machine say is
          the fastest
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from resmoe_dist.parallel.dispatcher import DispatchedTokens

if TYPE_CHECKING:
    from resmoe_dist.runtime.experts import CompressedExperts

MODES = ("auto", "restore", "shared", "tiled", "cached")


class Workspace:
    """One buffer that all layers restore into: it grows to the largest."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised matrix [rows, columns] in the buffer."""
        size = rows * columns
        buffer = self._buffer
        fits = buffer is not None and buffer.numel() >= size
        if not fits or buffer.dtype != dtype or buffer.device != device:
            self._buffer = buffer = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes the buffer holds now."""
        return 0 if self._buffer is None else self._buffer.nbytes


class RestoredExperts:
    """Dense experts under a byte budget; the least recently used go first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, nbytes: int, restore: Callable[[], Tensor]) -> Tensor | None:
        """The expert of `key`, restored if it is not here; None where the budget is below it."""
        if nbytes > self.budget:
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while self.nbytes + nbytes > self.budget:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        dense = self._kept[key] = restore()
        self.nbytes += dense.nbytes
        return dense


class Planner(Protocol):
    """Chooses for `auto`."""

    def prepare(self, experts: CompressedExperts) -> None:
        """Do now what `choose` would have to do once."""

    def choose(self, experts: CompressedExperts, tokens: DispatchedTokens) -> str:
        """The fastest of "restore", "shared" and "tiled" for these tokens."""


@dataclass
class Execution:
    """What the layers of one model share: the mode, and the memory it may use.

    mode: one of MODES. cache: for `cached`. planner: for `auto`.
    """

    mode: str = "shared"
    cache: RestoredExperts | None = None
    planner: Planner | None = None
    workspace: Workspace = field(default_factory=Workspace)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"execution {self.mode!r}: one of {', '.join(MODES)}")
        if (self.mode == "cached") != (self.cache is not None):
            raise ValueError("`cached`, and no other execution, has a cache")
        if (self.mode == "auto") != (self.planner is not None):
            raise ValueError("`auto`, and no other execution, has a planner")

    def prepare(self, experts: CompressedExperts) -> None:
        """Do now what the first tokens would have to wait for."""
        if self.planner and experts.codec.uses_center:
            self.planner.prepare(experts)

    def choose(self, experts: CompressedExperts, tokens: DispatchedTokens) -> str:
        """The mode for these tokens, which is not `auto`."""
        return self.planner.choose(experts, tokens) if self.planner else self.mode
