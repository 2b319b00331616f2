"""Weights of a group's entries, from the activations of its layer.

Legend: E experts of the group, I rows, D columns, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.blocks import EntryWeights
from resmoe_dist.design_matrix import ExpertShape

# Weight of inputs and neurons that no calibration token used, in units of the root mean square.
_MIN_WEIGHT = 1e-2


def entry_weights(
    shape: ExpertShape, measured: LayerActivations, permutations_EI: Tensor
) -> EntryWeights:
    """The factor that multiplies the error at each entry when the model runs.

    measured: of the group's experts, in the order of `permutations_EI`.

    All experts share one weight per entry, so that the joint centre stays exact: the weight of a
    neuron is the root mean square over the aligned experts. Inputs and neurons are each scaled to a
    mean square of 1, because errors before and after the activation have no common unit.
    """
    neuron_EI = measured.neuron_rms_EI.gather(1, permutations_EI)
    inputs = len(shape.inputs)
    column_D = torch.ones(shape.columns)
    column_D[: inputs * shape.hidden] = _unit_weights(measured.input_rms_H).repeat(inputs)
    row_I = _unit_weights(neuron_EI.square().mean(0).sqrt())
    return EntryWeights(column_D, row_I, slice(inputs * shape.hidden, (inputs + 1) * shape.hidden))


def _unit_weights(rms: Tensor) -> Tensor:
    """Scaled to a mean square of 1, and at least `_MIN_WEIGHT`."""
    scaled = rms / (float(rms.square().mean().sqrt()) or 1.0)
    return scaled.clamp(min=_MIN_WEIGHT)
