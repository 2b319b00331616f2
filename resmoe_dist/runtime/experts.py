"""The experts one rank owns, compressed: a row range of their centres and residuals, and the MLP.

Legend: L local experts, R received copies, H hidden, I rows of the whole expert, S rows of this
rank's shard, D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint, GroupFile, LayerEntry
from resmoe_dist.codecs import EncodedResidual
from resmoe_dist.design_matrix import ExpertShape, from_rows, row_range
from resmoe_dist.parallel.topology import Topology


class Workspace:
    """One buffer that all layers restore into, one expert at a time: it grows to the largest."""

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


class ExpertGroup(nn.Module):
    """The local experts of one group: center [S, D] (None counts as zero) and a residual each.

    experts: their numbers in the layer; the lists go with them. output_biases: [H] per expert, or
    empty.
    """

    center: Tensor | None

    def __init__(
        self,
        experts: list[int],
        center_SD: Tensor | None,
        residuals: list[EncodedResidual],
        output_biases: list[Tensor],
    ) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("center", center_SD, persistent=False)
        self.residuals = nn.ModuleList(residuals)
        biases = torch.stack(output_biases) if output_biases else None
        self.register_buffer("output_biases", biases, persistent=False)

    @classmethod
    def read(cls, file: GroupFile, experts: list[int], start: int, stop: int) -> ExpertGroup:
        """Rows [start, stop) of some of a group's experts, from its file."""
        biases = [file.read_output_bias(k) for k in experts]
        return cls(
            experts,
            file.read_center(start, stop),
            [file.read_residual(k, start, stop) for k in experts],
            [bias for bias in biases if bias is not None],
        )

    def restore(self, index: int, workspace: Workspace) -> Tensor:
        """Rows of expert `index` of this group, dense [S, D]: C + decode(residual)."""
        residual = self.residuals[index]
        if self.center is None and not residual.uses_center:
            # Stored whole: decoding is no work, and takes no memory.
            return residual.decode()
        values = next(tensor for tensor in residual.buffers() if tensor.is_floating_point())
        dense_SD = workspace.matrix(residual.rows, residual.columns, values.dtype, values.device)
        if self.center is None:
            dense_SD.zero_()
        else:
            dense_SD.copy_(self.center)
        residual.add_to(dense_SD)
        return dense_SD


class CompressedExperts(nn.Module):
    """The local experts of one layer, executed by restoring one at a time (paper 000, algorithm 2).

    places: (group, index in it) of each local expert, by its number. Inference only. With tensor
    parallelism the output is this rank's partial sum.
    """

    def __init__(
        self,
        shape: ExpertShape,
        groups: list[ExpertGroup],
        activation: nn.Module,
        workspace: Workspace,
        *,
        adds_output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.groups = nn.ModuleList(groups)
        # Tokens come sorted by expert, while neighbours among the experts may be of any groups.
        places = {k: (g, i) for g, group in enumerate(groups) for i, k in enumerate(group.experts)}
        self.places = [places[k] for k in sorted(places)]
        self.activation = activation
        self.workspace = workspace
        # Exactly one rank of a TP group adds the output bias, or the sum would hold it tp times.
        self.adds_output_bias = adds_output_bias

    @classmethod
    def load(
        cls,
        checkpoint: CompressedCheckpoint,
        layer: LayerEntry,
        topology: Topology,
        activation: nn.Module,
        workspace: Workspace,
    ) -> CompressedExperts:
        """Read this rank's experts and rows, opening only the files that hold them.

        Raises UserError when the experts do not divide over the grid, or a file is damaged.
        """
        start, stop = row_range(layer.rows, topology.tp_rank, topology.tp)
        owned = topology.owned_experts(layer.num_experts)
        groups = []
        for group in layer.groups:
            experts = [k for k in group.experts if k in owned]
            if experts:
                file = checkpoint.open_group(layer, group)
                groups.append(ExpertGroup.read(file, experts, start, stop))
        return cls(
            layer.shape,
            groups,
            activation,
            workspace,
            adds_output_bias=topology.tp_rank == 0,
        )

    @property
    def center_bytes(self) -> int:
        """Bytes of the live centre tensors."""
        return sum(g.center.nbytes for g in self.groups if g.center is not None)

    @property
    def residual_bytes(self) -> int:
        """Bytes of all other live expert tensors: values, indices, output biases."""
        return sum(buffer.nbytes for buffer in self.groups.buffers()) - self.center_bytes

    @torch.no_grad()
    def forward(self, x_RH: Tensor, tokens_per_expert: list[int]) -> Tensor:
        """Partial outputs y_RH of tokens sorted by local expert."""
        y_RH = torch.empty_like(x_RH)
        begin = 0
        for (group, index), tokens in zip(self.places, tokens_per_expert, strict=True):
            end = begin + tokens
            if tokens:
                y_RH[begin:end] = self._run(self.groups[group], index, x_RH[begin:end])
            begin = end
        return y_RH

    def _run(self, group: ExpertGroup, index: int, x_RH: Tensor) -> Tensor:
        weights = from_rows(self.shape, group.restore(index, self.workspace))
        inputs = [F.linear(x_RH, weights[n], weights.get(f"{n}_bias")) for n in self.shape.inputs]
        y_RH = F.linear(self.activation(*inputs), weights[self.shape.output])
        if self.shape.output_bias and self.adds_output_bias:
            y_RH = y_RH + group.output_biases[index]
        return y_RH
