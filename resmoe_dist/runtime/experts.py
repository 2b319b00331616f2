"""The experts one rank owns, compressed: a row range of their centres and residuals.

Legend: L local experts, R received rows (tokens), N routed copies, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.checkpoints.entries import LayerEntry
from resmoe_dist.codecs import EncodedMatrix
from resmoe_dist.design_matrix import row_range
from resmoe_dist.kernels import Activation, Backend, LayerWeights, backend_for
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import RoutedTokens
from resmoe_dist.runtime.execution import Execution, Product, Restore


class CompressedExperts(nn.Module):
    """The local experts of one layer, ready to run. Inference only.

    layer: their weights, which become submodules, so that they follow the model to a device or
    dtype. execution: how C + R is computed; the layers of a model share one. output_bias_LH: added
    to each expert's output, or None. With tensor parallelism the output is a partial sum, so
    exactly one rank of a tensor-parallel group has the biases. num_groups: of which this rank holds
    experts. model_entries: of all experts of the source's layer; more than are stored if the
    checkpoint has fewer experts or rows.
    """

    output_bias_LH: Tensor | None

    def __init__(
        self,
        layer: LayerWeights,
        execution: Execution | None = None,
        output_bias_LH: Tensor | None = None,
        num_groups: int | None = None,
        model_entries: int | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.centers = nn.ModuleList(layer.centers)
        self.residuals = nn.ModuleList(layer.residuals)
        self.register_buffer("output_bias_LH", output_bias_LH, persistent=False)
        self.num_groups = len(layer.centers) if num_groups is None else num_groups
        here = len(layer.residuals) * layer.shape.entries
        self.model_entries = here if model_entries is None else model_entries
        execution = execution or Product(share_center=True)
        self.execution = Restore() if layer.is_dense else execution
        self._backend: Backend | None = None

    @classmethod
    def load(
        cls,
        checkpoint: CompressedCheckpoint,
        entry: LayerEntry,
        topology: Topology,
        activation: Activation,
        execution: Execution | None = None,
    ) -> CompressedExperts:
        """Read this rank's experts and rows, opening only the files that hold them.

        Raises UserError if the experts do not divide over the grid or a file is damaged.
        """
        start, stop = row_range(entry.rows, topology.tp_rank, topology.tp)
        owned = topology.owned_experts(entry.stored_experts)
        centers: list[EncodedMatrix] = []
        residuals: dict[int, EncodedMatrix] = {}
        center_of: dict[int, int] = {}
        biases: dict[int, Tensor] = {}
        num_groups = 0
        for group in entry.groups:
            experts = [k for k in group.experts if k in owned]
            if not experts:
                continue
            num_groups += 1
            file = checkpoint.open_group(entry, group)
            center = file.read_center(start, stop)
            if center is not None:
                centers.append(center)
            for k in experts:
                residuals[k] = file.read_residual(k, start, stop, center)
                center_of[k] = -1 if center is None else len(centers) - 1
                bias_H = file.read_output_bias(k) if topology.tp_rank == 0 else None
                if bias_H is not None:
                    biases[k] = bias_H
        layer = LayerWeights(
            entry.shape,
            tuple(residuals[k] for k in owned),
            tuple(centers),
            tuple(center_of[k] for k in owned),
            activation,
        )
        output_bias_LH = torch.stack([biases[k] for k in owned]) if biases else None
        model_entries = entry.num_experts * entry.source_shape.entries
        return cls(layer, execution, output_bias_LH, num_groups, model_entries)

    @property
    def backend(self) -> Backend:
        """The kernels that run this layer, chosen once for a device and dtype."""
        if self._backend is None:
            self._backend = backend_for(self.layer)
        return self._backend

    def prepare(self) -> None:
        """Do now what the first tokens would otherwise wait for."""
        self.execution.prepare(self.backend)

    @torch.no_grad()
    def forward(self, routed: RoutedTokens) -> Tensor:
        """Partial sums [R, H] over the local experts of each token, in the dtype of the tokens."""
        if not len(routed.token_N):
            return torch.zeros_like(routed.x_RH)
        y_RH = self.execution.run(routed, self.backend)
        if self.output_bias_LH is not None:
            expert_N = routed.expert_N.clamp(max=self.layer.num_experts - 1)
            bias_NH = self.output_bias_LH.float()[expert_N] * routed.weight_N.unsqueeze(1)
            y_RH.index_add_(0, routed.token_N, bias_NH)
        return y_RH.to(routed.x_RH.dtype)

    @property
    def center_bytes(self) -> int:
        """Bytes of the live centre tensors."""
        return sum(center.nbytes for center in self.layer.centers)

    @property
    def residual_bytes(self) -> int:
        """Bytes of all other live expert tensors: residuals, output biases, decoded row biases."""
        prepared = self._backend.prepared_bytes if self._backend else 0
        return sum(buffer.nbytes for buffer in self.buffers()) - self.center_bytes + prepared

    def _apply(self, *args: Any, **kwargs: Any) -> CompressedExperts:
        # What a backend prepared belongs to the old device and dtype.
        self._backend = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A backend holds addresses; a copy of the module makes its own.
        return self.__dict__ | {"_backend": None}
