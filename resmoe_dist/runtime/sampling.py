"""Sampling whose draws depend on the prompt alone, not on its lane or batch.

Adding Gumbel noise to logits and taking the largest samples from their softmax. The noise of the
n-th new token of prompt i follows from the seed, i and n.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


class GumbelNoise(LogitsProcessor):
    """Adds noise to the logits of each row, from that prompt's generator.

    seed: of all prompts. numbers: of the prompts in the batch, one per row.
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self._generators = [_generator(seed, number) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy logits [B, V]; input_ids [B, S] is not used."""
        # Drawn on the CPU, so that every device gets the same numbers.
        uniform_BV = torch.stack(
            [torch.rand(scores.shape[1], generator=each) for each in self._generators]
        )
        noise_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
        return scores + noise_BV.to(scores.device)


def sampling_processors(
    seed: int, numbers: Sequence[int], temperature: float, top_p: float | None
) -> LogitsProcessorList:
    """What turns greedy decoding into sampling: temperature, nucleus, noise."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(GumbelNoise(seed, numbers))
    return processors


def _generator(seed: int, number: int) -> torch.Generator:
    """The generator of one prompt."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
