"""Activation statistics of MoE layers, and the file that hands them from one process to others.

Legend: E experts, H hidden, I intermediate rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.errors import UserError
from resmoe_dist.families.sites import ExpertSite


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Root mean squares of what one layer's expert weights are multiplied by.

    input_rms_H: of each column of the hidden states that enter the experts, over all tokens,
    float32. neuron_rms_EI: of each input of the down (or out) projection, over the tokens routed to
    that expert, float32. tokens_E: how many tokens those were, int64.

    An expert without tokens has the mean of those with some; ones stand where nothing was measured.

    Source: Wanda (Sun et al. 2023, arXiv:2306.11695), which scores a weight |W_ij|·‖x_j‖; a root
    mean square is that norm over √tokens, so that experts with unequal tokens compare.
    """

    input_rms_H: Tensor
    neuron_rms_EI: Tensor
    tokens_E: Tensor


def save_activations(
    path: Path, sites: Sequence[ExpertSite], layers: Sequence[LayerActivations]
) -> None:
    """Write the statistics of `sites` to one safetensors file, atomically.

    Raises UserError as `write_tensors` does.
    """
    tensors = {
        f"{site.module}.{part}": tensor
        for site, layer in zip(sites, layers, strict=True)
        for part, tensor in vars(layer).items()
    }
    write_tensors(path, tensors, {})


def load_activations(path: Path, sites: Sequence[ExpertSite]) -> list[LayerActivations]:
    """The statistics of `sites`, in their order.

    Raises UserError where the file is missing or damaged, or was measured on another model.
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
                    f"{path}: tensor {name!r} has shape {list(file.shape(name))}, the model's is "
                    f"{list(shape)}; these are another model's statistics, measure them anew"
                )
        parts = {part: file.read(f"{site.module}.{part}") for part in shapes}
        layers.append(LayerActivations(**parts))
    return layers
