"""How C + R is computed: one class per way, chosen once for a model.

    shared      centre once per token, residuals per copy: reads the fewest bytes
    tiled       rows restored a few at a time inside the product, never written to memory
    restore     each expert restored into a reused workspace, then dense products (paper 000,
                algorithm 2): the least work per token
    cached      as `restore`; restored experts are kept up to a byte budget
    auto        whichever of the first three costs least by measurements on this machine

All give the same result.

Legend: R received rows (tokens), n copies of one expert, S rows of a shard, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.design_matrix import from_rows
from resmoe_dist.kernels import Backend
from resmoe_dist.routing import RoutedTokens

MODES = ("auto", "restore", "shared", "tiled", "cached")
# On a CPU, restored rows of this size stay in the last-level cache while they are used.
CPU_BLOCK_BYTES = 8 << 20


class Execution(ABC):
    """A way to run the experts of a layer. The layers of a model share one instance."""

    def prepare(self, backend: Backend) -> None:  # noqa: B027, most ways have nothing to prepare
        """Do now what the first tokens would otherwise wait for."""

    @abstractmethod
    def run(self, routed: RoutedTokens, backend: Backend) -> Tensor:
        """The weighted sum of each token's local experts: [R, H] in float32."""


class Product(Execution):
    """`shared` and `tiled`: nothing is restored."""

    def __init__(self, *, share_center: bool) -> None:
        self.share_center = share_center

    def run(self, routed: RoutedTokens, backend: Backend) -> Tensor:
        return backend.mlp(routed, share_center=self.share_center)


class Workspace:
    """One buffer that all layers restore into. It grows to the largest request."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised matrix [rows, columns] in the buffer."""
        size = rows * columns
        buffer = self._buffer
        if (
            buffer is None
            or buffer.numel() < size
            or buffer.dtype != dtype
            or buffer.device != device
        ):
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
        """The expert of `key`, restored if it is not cached. None if it exceeds the budget."""
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


class Restore(Execution):
    """`restore`, and with a cache `cached`: dense products with one expert after the other.

    Layers whose experts are stored dense are run this way in every mode.
    """

    def __init__(
        self, cache: RestoredExperts | None = None, cpu_block_bytes: int = CPU_BLOCK_BYTES
    ) -> None:
        self.cache = cache
        self.workspace = Workspace()
        self._cpu_block_bytes = cpu_block_bytes

    @torch.no_grad()
    def run(self, routed: RoutedTokens, backend: Backend) -> Tensor:
        x_RH = routed.x_RH
        y_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        # Only experts with copies are restored, so the host has to know which those are.
        offsets = routed.host_offsets()
        for expert, (begin, end) in enumerate(pairwise(offsets)):
            if begin == end:
                continue
            token_n = routed.token_N[begin:end]
            y_nH = self._run_expert(backend, expert, x_RH[token_n])
            y_RH.index_add_(0, token_n, y_nH * routed.weight_N[begin:end].unsqueeze(1))
        return y_RH

    def _run_expert(self, backend: Backend, expert: int, x_nH: Tensor) -> Tensor:
        """One expert on some tokens, block of rows by block of rows: [n, H] in float32."""
        layer = backend.layer
        y_nH = torch.zeros(x_nH.shape, dtype=torch.float32, device=x_nH.device)
        for block_SD in self._dense_blocks(backend, expert):
            weights = from_rows(layer.shape, block_SD)
            inputs = [
                F.linear(x_nH, weights[name], weights.get(f"{name}_bias"))
                for name in layer.shape.inputs
            ]
            y_nH += F.linear(layer.activation(*inputs), weights[layer.shape.output])
        return y_nH

    def _dense_blocks(self, backend: Backend, expert: int) -> Iterator[Tensor]:
        """The restored rows of an expert, in blocks. The next block overwrites the last."""
        layer = backend.layer
        if layer.is_dense:
            yield layer.residuals[expert].decode()
            return
        S, columns = layer.rows, layer.shape.columns
        row_bytes = columns * layer.dtype.itemsize
        if self.cache is not None:

            def restore() -> Tensor:
                dense_SD = torch.empty(S, columns, dtype=layer.dtype, device=layer.device)
                backend.restore(expert, dense_SD)
                return dense_SD

            kept = self.cache.get((backend.key, expert), S * row_bytes, restore)
            if kept is not None:
                yield kept
                return
        block = S
        if layer.device.type == "cpu":
            block = min(S, max(1, self._cpu_block_bytes // row_bytes))
        for first in range(0, S, block):
            block_SD = self.workspace.matrix(
                min(block, S - first), columns, layer.dtype, layer.device
            )
            backend.restore(expert, block_SD, first)
            yield block_SD


class Planner(Protocol):
    """Chooses the way for `auto`."""

    def prepare(self, backend: Backend) -> None:
        """Do now what `choose` would otherwise do on its first call."""

    def choose(self, backend: Backend, tokens: int, copies: int) -> str:
        """The fastest of "restore", "shared" and "tiled" for this many tokens and copies."""


class Auto(Execution):
    """`auto`: asks a planner for every call."""

    def __init__(self, planner: Planner, ways: dict[str, Execution] | None = None) -> None:
        self.planner = planner
        self.ways = ways or {
            "restore": Restore(),
            "shared": Product(share_center=True),
            "tiled": Product(share_center=False),
        }

    def prepare(self, backend: Backend) -> None:
        self.planner.prepare(backend)

    def run(self, routed: RoutedTokens, backend: Backend) -> Tensor:
        choice = self.planner.choose(backend, len(routed.x_RH), len(routed.token_N))
        return self.ways[choice].run(routed, backend)
