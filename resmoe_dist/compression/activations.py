"""Activation statistics of MoE layers, and the file that stores them.

The statistics weight compression errors: an entry matters more if its input is large.

Legend: E experts, H hidden, I intermediate rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.errors import UserError
from resmoe_dist.families.storage import ExpertSite


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Root mean squares of the inputs to one layer's expert weights.

    input_rms_H: of each hidden dimension of the experts' input, over all tokens, float32.
    neuron_rms_EI: of each input of the down (or out) projection, over the tokens routed to that
    expert, float32. tokens_E: number of tokens routed to each expert, int64.

    An expert without tokens gets the mean over the experts that have some. Statistics without any
    token are all ones.

    Source: Wanda (Sun et al. 2023, arXiv:2306.11695), which scores a weight |W_ij|·‖x_j‖. A root
    mean square is that norm divided by √tokens, so experts with different numbers of tokens are
    comparable.
    """

    input_rms_H: Tensor
    neuron_rms_EI: Tensor
    tokens_E: Tensor

    def of_experts(self, experts: Sequence[int]) -> LayerActivations:
        """The statistics of some experts of the layer, in the order given."""
        chosen = list(experts)
        return replace(
            self, neuron_rms_EI=self.neuron_rms_EI[chosen], tokens_E=self.tokens_E[chosen]
        )


def save_activations(
    path: Path, sites: Sequence[ExpertSite], layers: Sequence[LayerActivations]
) -> None:
    """Write the statistics of `sites` to one safetensors file, atomically.

    Raises UserError if the file cannot be written (see `write_tensors`).
    """
    tensors = {
        f"{site.module}.{part}": tensor
        for site, layer in zip(sites, layers, strict=True)
        for part, tensor in vars(layer).items()
    }
    write_tensors(path, tensors, {})


def load_activations(path: Path, sites: Sequence[ExpertSite]) -> list[LayerActivations]:
    """Read the statistics of `sites`, in the order of `sites`.

    Raises UserError if the file is missing or damaged, or was measured on another model.
    """
    file = TensorFile(path)
    layers = []
    for site in sites:
        experts, hidden, rows = site.num_experts, site.shape.hidden, site.shape.rows
        shapes = {
            "input_rms_H": (hidden,),
            "neuron_rms_EI": (experts, rows),
            "tokens_E": (experts,),
        }
        for part, shape in shapes.items():
            name = f"{site.module}.{part}"
            if file.shape(name) != shape:
                raise UserError(
                    f"{path}: tensor {name!r} has shape {list(file.shape(name))}, the model needs "
                    f"{list(shape)}; these are another model's statistics, measure again"
                )
        parts = {part: file.read(f"{site.module}.{part}") for part in shapes}
        layers.append(LayerActivations(**parts))
    return layers
