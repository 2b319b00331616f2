"""The experts of a group in aligned order, read in blocks of rows or as a sample of entries.

The experts stay in memory as they were read, in their stored dtype. Permuted float32 copies exist
for one block at a time.

Legend: E experts of the group, I rows, D columns, B rows of a block, S sampled entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resmoe_dist.compression.scaling import power_of_two_scale
from resmoe_dist.heap import return_freed_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BlockSizes:
    """How much of a group is processed at a time. Results do not depend on `block_values`.

    block_values: values of one block, over all experts in it. By default, the temporaries of a
    block fit in the processor's cache.
    sample_entries: wanted entries of a sample. By default, a share of the entries that is estimated
    from the sample is accurate to 0.07 %.
    sample_values: limit on the values of a sample, entries × experts. By default, groups of more
    than eight experts have fewer sampled entries.
    blocks_per_trim: freed memory is returned to the system once per so many blocks.
    """

    block_values: int = 1 << 20
    sample_entries: int = 1 << 19
    sample_values: int = 1 << 22
    blocks_per_trim: int = 64


@dataclass(frozen=True)
class EntryWeights:
    """The weight of each entry's error: column_D, times row_I in the columns `output_columns`.

    The input projections (gate and up, or in) read the hidden state: one weight per column. The
    output projection reads the neurons: one weight per row.
    """

    column_D: Tensor
    row_I: Tensor
    output_columns: slice

    def block(self, rows: slice) -> Tensor:
        """Weights [B, D] of a range of rows."""
        weight_BD = self.column_D.repeat(len(self.row_I[rows]), 1)
        weight_BD[:, self.output_columns] *= self.row_I[rows].unsqueeze(1)
        return weight_BD


@dataclass(frozen=True)
class AlignedExperts:
    """The experts of one group with the permutations that align their rows.

    experts_EID: any float dtype, rows in stored order. permutations_EI: expert k in aligned order
    is experts_EID[k, permutations_EI[k]]. weights: None if all entries count alike. device: where
    blocks of rows are processed; samples stay on the CPU. sizes: of blocks and samples.
    """

    experts_EID: Tensor
    permutations_EI: Tensor
    weights: EntryWeights | None = None
    device: torch.device = CPU
    sizes: BlockSizes = BlockSizes()

    @property
    def count(self) -> int:
        """E."""
        return self.experts_EID.shape[0]

    @property
    def entries(self) -> int:
        """I·D."""
        return self.experts_EID[0].numel()

    @cached_property
    def scale(self) -> float:
        """`power_of_two_scale` of the experts."""
        return power_of_two_scale(self.experts_EID)

    def blocks(self, experts_per_block: int | None = None) -> Iterator[slice]:
        """Ranges of rows that tile [0, I).

        experts_per_block: how many experts are read per block (default E); fewer experts, more rows
        per block.
        """
        rows, columns = self.experts_EID.shape[1:]
        step = max(1, self.sizes.block_values // ((experts_per_block or self.count) * columns))
        for number, start in enumerate(range(0, rows, step)):
            yield slice(start, min(start + step, rows))
            # The result of a block is allocated between its temporaries, and the allocator does not
            # reuse the gaps: without this, memory grows by gigabytes over a large group.
            if number % self.sizes.blocks_per_trim == 0:
                return_freed_memory()

    def block(self, rows: slice) -> Tensor:
        """A range of rows of all experts in aligned order, float32 [E, B, D]."""
        return torch.stack([self.expert_rows(k, rows) for k in range(self.count)])

    def expert_rows(self, k: int, rows: slice) -> Tensor:
        """A range of rows of expert `k` in aligned order, float32 [B, D]."""
        rows_BD = self.experts_EID[k, self.permutations_EI[k, rows]]
        return rows_BD.to(self.device, torch.float32)

    def block_weights(self, rows: slice) -> Tensor | None:
        """Weights [B, D] of a range of rows, or None."""
        return None if self.weights is None else self.weights.block(rows).to(self.device)

    @cached_property
    def sample(self) -> Tensor:
        """`sample_of` each expert in aligned order: float32 [E, S]."""
        row_S, column_S = self._sample_position
        sample_ES = torch.empty(self.count, len(row_S))
        for k, expert_ID in enumerate(self.experts_EID):
            sample_ES[k] = expert_ID[self.permutations_EI[k, row_S], column_S]
        return sample_ES / self.scale

    @cached_property
    def sample_weights(self) -> Tensor | None:
        """Weights [S] of the sampled entries, or None."""
        if self.weights is None:
            return None
        row_S, column_S = self._sample_position
        is_output_D = torch.zeros(self.experts_EID.shape[2], dtype=torch.bool)
        is_output_D[self.weights.output_columns] = True
        weight_S, is_output_S = self.weights.column_D[column_S], is_output_D[column_S]
        weight_S[is_output_S] *= self.weights.row_I[row_S[is_output_S]]
        return weight_S

    def sample_of(self, aligned_ID: Tensor) -> Tensor:
        """Evenly spread entries [S] of a matrix in aligned order, divided by `scale`.

        All entries if there are few. The positions depend on the shape and the sizes only.
        """
        row_S, column_S = self._sample_position
        return aligned_ID[row_S, column_S].float() / self.scale

    def as_sample(self) -> AlignedExperts:
        """The sampled entries as a group of experts with one row, to estimate results quickly."""
        weights = None
        if self.sample_weights is not None:
            weights = EntryWeights(self.sample_weights, torch.ones(1), slice(0, 0))
        identity_E1 = torch.zeros(self.count, 1, dtype=torch.int64)
        return AlignedExperts(self.sample.unsqueeze(1), identity_E1, weights, sizes=self.sizes)

    @cached_property
    def _sample_position(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the sampled entries."""
        columns = self.experts_EID.shape[2]
        wanted = max(1, min(self.sizes.sample_entries, self.sizes.sample_values // self.count))
        step = max(1, self.entries // wanted)
        # With a factor in common, the sample would miss some of the columns.
        while math.gcd(step, columns) > 1 and step > 1:
            step += 1
        at_S = torch.arange(0, self.entries, step)
        return at_S // columns, at_S % columns
