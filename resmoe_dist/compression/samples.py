"""What a layer's tokens looked like while a text ran through the source model, and its files.

Methods that look at routing or at outputs of experts work on these samples: with a layer's inputs
and its weights they compute whatever else they need.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resmoe_dist.checkpoints.tensor_files import TensorFile, write_tensors
from resmoe_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LayerSamples:
    """The tokens that one MoE layer received.

    inputs_TH: the experts' input, in the model's dtype. index_TK, weights_TK: the experts that the
    router chose, and their weights; NO_EXPERT where it dropped the token. logits_TE: the router's,
    float32, before softmax, sigmoid or bias; None if transformers does not say where this family
    computes them.
    """

    inputs_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None = None

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs [R, H] of the tokens routed to an expert, and their weights [R]."""
        token_R, slot_R = torch.where(self.index_TK == expert)
        return self.inputs_TH[token_R], self.weights_TK[token_R, slot_R]

    @classmethod
    def join(cls, parts: list[LayerSamples]) -> LayerSamples:
        """Samples of the same layer, one after the other."""
        logits = [part.logits_TE for part in parts if part.logits_TE is not None]
        return cls(
            inputs_TH=torch.cat([part.inputs_TH for part in parts]),
            index_TK=torch.cat([part.index_TK for part in parts]),
            weights_TK=torch.cat([part.weights_TK for part in parts]),
            logits_TE=torch.cat(logits) if logits else None,
        )


class SampleFiles:
    """Samples of all MoE layers, in files of a folder, so that memory holds one layer's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, layer: int, part: int, samples: LayerSamples) -> None:
        """Store some tokens of a layer. part: counted from 0, in the order of the tokens.

        Raises UserError if the file cannot be written.
        """
        given = {name: tensor for name, tensor in vars(samples).items() if tensor is not None}
        tensors = {name: tensor.contiguous() for name, tensor in given.items()}
        write_tensors(self._path(layer, part), tensors, {})

    def read(self, layer: int) -> LayerSamples:
        """All tokens of a layer. Raises UserError if it received none, or a file is damaged."""
        if not (parts := self.parts(layer)):
            raise UserError(
                f"MoE layer {layer}: receives no token of the calibration text; leave it out with "
                "--layers"
            )
        return LayerSamples.join([_read(self._path(layer, part)) for part in range(parts)])

    def parts(self, layer: int) -> int:
        """In how many parts a layer's tokens came."""
        count = 0
        while self._path(layer, count).exists():
            count += 1
        return count

    def _path(self, layer: int, part: int) -> Path:
        return self._folder / f"samples-{layer:05d}-{part:05d}.safetensors"


def _read(path: Path) -> LayerSamples:
    file = TensorFile(path)
    return LayerSamples(**{name: file.read(name) for name in file.names})
