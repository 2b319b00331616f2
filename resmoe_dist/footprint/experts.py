"""The bytes of one layer's experts, on disk and on each rank of a grid.

Legend: I rows, R rows of one tensor-parallel rank, E experts of a group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from resmoe_dist.codecs import CodecSpec
from resmoe_dist.design_matrix import ExpertShape, row_range
from resmoe_dist.parallel.topology import owned_experts

# The runtime decodes the biases of the input projections to float32.
_DECODED_BIAS = 4


@dataclass(frozen=True)
class ExpertBytes:
    """center: bytes of centres. residual: of everything else that belongs to experts."""

    center: int = 0
    residual: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.center + self.residual

    def __add__(self, other: ExpertBytes) -> ExpertBytes:
        return ExpertBytes(self.center + other.center, self.residual + other.residual)


@dataclass(frozen=True)
class PlannedGroup:
    """How the experts of one group are stored.

    experts: their numbers in the layer. center: codec of the centre, None without one. residual:
    codec of the residuals. measured: bytes in the group's file, None if it does not exist yet.
    """

    experts: tuple[int, ...]
    center: CodecSpec | None
    residual: CodecSpec
    measured: ExpertBytes | None = None


@dataclass(frozen=True)
class PlannedLayer:
    """The stored experts of one layer. itemsize: bytes of a value in the files."""

    module: str
    shape: ExpertShape
    num_experts: int
    itemsize: int
    groups: tuple[PlannedGroup, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the layer's files."""
        return sum(self._stored(group).total for group in self.groups)

    def rank_bytes(self, ep: int, tp: int, tp_rank: int, itemsize: int) -> list[ExpertBytes]:
        """Bytes in memory of each expert-parallel rank, at one tensor-parallel rank.

        itemsize: bytes of a value in memory. A centre counts on every rank that has an expert of
        its group. Residuals are exact if each rank holds all rows of whole groups, or if all rows
        and experts of a group take the same bytes. Raises UserError if ep does not divide the
        experts.
        """
        shape = self.shape
        start, stop = row_range(shape.rows, tp_rank, tp)
        owned = len(owned_experts(self.num_experts, 0, ep))
        ranks = [ExpertBytes()] * ep
        for group in self.groups:
            center = self._center_bytes(group, stop - start, itemsize)
            expert = self._residual_bytes(group, stop - start, itemsize, has_bias=tp_rank == 0)
            residual = len(group.experts) * expert
            if group.measured is not None:
                # Exact for a whole group, where codecs give an upper bound.
                predicted = self._predicted(group)
                center = _scaled(center, group.measured.center, predicted.center)
                residual = _scaled(residual, group.measured.residual, predicted.residual)
            if shape.row_bias:
                decoded = len(shape.inputs) * (stop - start) * _DECODED_BIAS
                residual += len(group.experts) * decoded
            here = Counter(k // owned for k in group.experts)
            for rank, count in here.items():
                ranks[rank] += ExpertBytes(center, -(-residual * count // len(group.experts)))
        return ranks

    def _stored(self, group: PlannedGroup) -> ExpertBytes:
        return group.measured or self._predicted(group)

    def _predicted(self, group: PlannedGroup) -> ExpertBytes:
        """Upper bound of a group's bytes in its file."""
        rows, itemsize = self.shape.rows, self.itemsize
        residual = self._residual_bytes(group, rows, itemsize, has_bias=True)
        return ExpertBytes(self._center_bytes(group, rows, itemsize), len(group.experts) * residual)

    def _center_bytes(self, group: PlannedGroup, held: int, itemsize: int) -> int:
        return 0 if group.center is None else self._matrix_bytes(group.center, held, itemsize)

    def _residual_bytes(
        self, group: PlannedGroup, held: int, itemsize: int, *, has_bias: bool
    ) -> int:
        """Of one expert: `held` rows of its residual, and its output bias."""
        biases = self.shape.hidden * itemsize if self.shape.output_bias and has_bias else 0
        return self._matrix_bytes(group.residual, held, itemsize) + biases

    def _matrix_bytes(self, spec: CodecSpec, held: int, itemsize: int) -> int:
        rows, columns = self.shape.rows, self.shape.columns
        return spec.codec.sliced_bytes(rows, columns, held, spec.config, itemsize)


def _scaled(part: int, measured: int, predicted: int) -> int:
    """A predicted part of something, corrected by what the whole was measured to take."""
    return -(-part * measured // predicted) if predicted else measured
