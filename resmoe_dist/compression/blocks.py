"""A group's experts in aligned order, read in blocks of rows or as a sample of entries.

The experts stay as they were read, in their stored dtype; permuted float32 copies exist for one
block at a time.

Legend: N experts of the group, I rows, D columns, B rows of a block, S sampled entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resmoe_dist.process_memory import return_freed_memory

CPU = torch.device("cpu")
# Values, over all experts, of one block: its temporaries stay in the processor's cache.
_BLOCK_VALUES = 1 << 20
_BLOCKS_PER_TRIM = 64
# Entries of a sample: shares read off it are right to 0.07 %. Values: of more experts than eight,
# fewer entries.
_SAMPLE_ENTRIES = 1 << 19
_SAMPLE_VALUES = 1 << 22


def unit_of(matrix: Tensor) -> float:
    """A power of two about the largest magnitude: in units of it squares stay within float32.

    Being a power of two, it changes no digit.
    """
    low, high = matrix.aminmax()
    # Never so small that float32 could not hold its inverse.
    return 2.0 ** max(math.frexp(max(-float(low), float(high)))[1], -100)


@dataclass(frozen=True)
class EntryWeights:
    """What an error at each entry is multiplied by: column_D, times row_I in `row_columns`.

    Projections read by the hidden state have one weight per column; the output projection, whose
    input is a neuron, one per row.
    """

    column_D: Tensor
    row_I: Tensor
    row_columns: slice

    def rows(self, rows: slice) -> Tensor:
        """Weights [B, D] of a range of rows."""
        weight_BD = self.column_D.repeat(len(self.row_I[rows]), 1)
        weight_BD[:, self.row_columns] *= self.row_I[rows].unsqueeze(1)
        return weight_BD


@dataclass(frozen=True)
class AlignedExperts:
    """experts_NID: any float dtype, rows as stored. permutations_NI: expert k in aligned order is
    experts_NID[k, permutations_NI[k]]. weights: None where all entries count alike. device: where
    blocks of rows are put to be worked on; samples stay on the CPU."""

    experts_NID: Tensor
    permutations_NI: Tensor
    weights: EntryWeights | None = None
    device: torch.device = CPU

    @property
    def count(self) -> int:
        """N."""
        return self.experts_NID.shape[0]

    @property
    def entries(self) -> int:
        """I·D."""
        return self.experts_NID[0].numel()

    @cached_property
    def unit(self) -> float:
        """`unit_of` the experts."""
        return unit_of(self.experts_NID)

    def blocks(self, experts: int | None = None) -> Iterator[slice]:
        """Ranges of rows that tile [0, I), for `experts` (default N) read at a time."""
        rows, columns = self.experts_NID.shape[1:]
        step = max(1, _BLOCK_VALUES // ((experts or self.count) * columns))
        for number, start in enumerate(range(0, rows, step)):
            yield slice(start, min(start + step, rows))
            # What a block leaves behind lies between its temporaries, and the holes are not reused:
            # without this, memory would grow by gigabytes over a large group.
            if number % _BLOCKS_PER_TRIM == 0:
                return_freed_memory()

    def rows(self, rows: slice) -> Tensor:
        """Rows of all experts in aligned order, float32 [N, B, D]."""
        return torch.stack([self.expert_rows(k, rows) for k in range(self.count)])

    def expert_rows(self, k: int, rows: slice) -> Tensor:
        """Rows of expert `k` in aligned order, float32 [B, D]."""
        rows_BD = self.experts_NID[k, self.permutations_NI[k, rows]]
        return rows_BD.to(self.device, torch.float32)

    def row_weights(self, rows: slice) -> Tensor | None:
        """Weights [B, D] of a range of rows, or None."""
        return None if self.weights is None else self.weights.rows(rows).to(self.device)

    @cached_property
    def sample(self) -> Tensor:
        """Every expert's `sampled` entries in aligned order: float32 [N, S]."""
        row_S, column_S = self._sample
        sample_NS = torch.empty(self.count, len(row_S))
        for k, expert_ID in enumerate(self.experts_NID):
            sample_NS[k] = expert_ID[self.permutations_NI[k, row_S], column_S]
        return sample_NS / self.unit

    @cached_property
    def sample_weights(self) -> Tensor | None:
        """Weights [S] of the sampled entries, or None."""
        if self.weights is None:
            return None
        row_S, column_S = self._sample
        within_D = torch.zeros(self.experts_NID.shape[2], dtype=torch.bool)
        within_D[self.weights.row_columns] = True
        weight_S, within_S = self.weights.column_D[column_S], within_D[column_S]
        weight_S[within_S] *= self.weights.row_I[row_S[within_S]]
        return weight_S

    def sampled(self, aligned_ID: Tensor) -> Tensor:
        """Some evenly spread entries of a matrix in aligned order, or all if they are few: [S].

        In units of `unit`. Which entries, the shape alone decides.
        """
        row_S, column_S = self._sample
        return aligned_ID[row_S, column_S].float() / self.unit

    def as_sample(self) -> AlignedExperts:
        """The sampled entries as a group of their own: what holds for it holds for all, nearly."""
        weights = None
        if self.sample_weights is not None:
            weights = EntryWeights(self.sample_weights, torch.ones(1), slice(0, 0))
        in_order_N1 = torch.zeros(self.count, 1, dtype=torch.int64)
        return AlignedExperts(self.sample.unsqueeze(1), in_order_N1, weights)

    @cached_property
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the sampled entries."""
        columns = self.experts_NID.shape[2]
        wanted = max(1, min(_SAMPLE_ENTRIES, _SAMPLE_VALUES // self.count))
        step = max(1, self.entries // wanted)
        # No common factor: else the sample would see only some of the columns.
        while math.gcd(step, columns) > 1 and step > 1:
            step += 1
        at_S = torch.arange(0, self.entries, step)
        return at_S // columns, at_S % columns
