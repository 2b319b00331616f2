"""How much the model's predictions suffer from errors of each layer's experts: measured.

The calibration text runs through the model as several copies in one batch. One stays as it is. In
each other copy, the experts of one layer get noise, like what a code of two bits per entry leaves.
The divergence of that copy's predictions says what bits of the layer are worth. Only forward passes
are needed, with one expert in memory at a time.

Legend: C copies, N and n tokens of each copy, T tokens of all, K experts per token, R received
rows (the tokens of one expert), B batch, S sequence, I rows, D columns, H hidden, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.design_matrix import from_rows
from resmoe_dist.families.adapters import ExpertsAdapter
from resmoe_dist.jobs.streaming import ExpertReader, StreamedExperts, load_streamed, run_streamed

# Share of the experts' energy that the noise has, about what two bits per entry leave.
NOISE = 0.07
# Copies of one pass, and sequences of all of them together: as many tokens as a calibration.
_MAX_COPIES = 8
_SEQUENCES = 16
# Share of the mean that every layer counts for.
_LEAST_SHARE = 0.01
# Tokens whose predictions are compared together.
_TOKENS_AT_A_TIME = 64


def measure_sensitivity(
    source: SourceCheckpoint,
    sequences: list[list[int]],
    layers: Sequence[int],
    *,
    progress: bool = True,
) -> list[float] | None:
    """The sensitivity of each of `layers` (positions in `source.sites`).

    It is the Kullback-Leibler divergence of the predictions from the model's own, in nats per
    token, per share of the energy that all experts of the layer lose. sequences: token ids, all of
    the same length. progress: as of `run_streamed`.

    Layers count for a hundredth of the mean at least: other texts may need them. None if
    transformers does not say which module makes the predictions.

    Memory: as `measure_activations`, and predictions of 64 tokens.
    """

    def make(layer: int, adapter: ExpertsAdapter, activation: nn.Module) -> _NoisyExperts:
        return _NoisyExperts(ExpertReader.of_source(source, layer), adapter, activation, layer)

    model = load_streamed(source, make)
    head = model.get_output_embeddings()
    if head is None:
        return None
    experts = [model.get_submodule(source.sites[layer].module) for layer in layers]
    found: list[float] = []
    for start in range(0, len(experts), _MAX_COPIES - 1):
        changed = experts[start : start + _MAX_COPIES - 1]
        copies = 1 + len(changed)
        for copy, module in enumerate(changed, start=1):
            module.change_copy(copy, copies)
        ids_BS = torch.tensor(sequences[: max(1, _SEQUENCES // copies)])
        inputs = _HeadInputs(head)
        run_streamed(
            source,
            model,
            [ids_BS.repeat(copies, 1)],
            "measuring sensitivity",
            progress=progress,
            with_head=True,
        )
        inputs_BSH = inputs.take()
        if inputs_BSH is None:
            return None
        found += _divergences(head, inputs_BSH.unflatten(0, (copies, -1)).flatten(1, 2))
        for module in changed:
            module.change_nothing()
    least = _LEAST_SHARE * statistics.fmean(found)
    return [max(each, least) / NOISE for each in found]


class _NoisyExperts(StreamedExperts):
    """Experts that are changed for the tokens of one copy."""

    def __init__(
        self, reader: ExpertReader, adapter: ExpertsAdapter, activation: nn.Module, layer: int
    ) -> None:
        super().__init__(reader, adapter, activation)
        self._layer = layer
        self._copy, self._copies, self._tokens = 0, 1, 0

    def change_copy(self, copy: int, copies: int) -> None:
        """Change the experts of one of so many copies, which have equal parts of the tokens."""
        self._copy, self._copies = copy, copies

    def change_nothing(self) -> None:
        """Run all tokens with the same experts."""
        self._copies = 1

    def see_tokens(self, inputs_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        self._tokens = len(inputs_TH)

    def run_expert(self, expert: int, x_RH: Tensor, token_R: Tensor) -> Tensor:
        matrix_ID, bias_H = self.reader.read(expert)
        y_RH = self.run_with(expert, matrix_ID, bias_H, x_RH)
        is_changed_R = token_R * self._copies // self._tokens == self._copy
        if self._copies > 1 and is_changed_R.any():
            noisy_ID = self._with_noise(expert, matrix_ID)
            y_RH[is_changed_R] = self.run_with(expert, noisy_ID, bias_H, x_RH[is_changed_R])
        return y_RH

    def _with_noise(self, expert: int, matrix_ID: Tensor) -> Tensor:
        """Every projection with Gaussian noise of NOISE times its energy. Biases stay."""
        shape = self.reader.shape
        generator = torch.Generator().manual_seed(self._layer << 20 | expert)
        noisy_ID = matrix_ID.float().clone()
        weights = from_rows(shape, noisy_ID)
        for name in (*shape.inputs, shape.output):
            weight = weights[name]
            noise = torch.randn(weight.shape, generator=generator)
            weight += noise * (NOISE * weight.square().mean()).sqrt()
        return noisy_ID


class _HeadInputs:
    """Keeps what a model's head receives, and lets the head compute a single token."""

    def __init__(self, head: nn.Module) -> None:
        self.seen_BSH: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.seen_BSH = args[0]
        return (args[0][:, :1], *args[1:])

    def take(self) -> Tensor | None:
        """The inputs [B, S, H] of the last pass; None if the head has not run."""
        self._hook.remove()
        return self.seen_BSH


@torch.no_grad()
def _divergences(head: nn.Module, inputs_CNH: Tensor) -> list[float]:
    """The mean divergence of each copy's predictions from those of the first."""
    totals = torch.zeros(len(inputs_CNH) - 1, dtype=torch.float64)
    for inputs_CnH in inputs_CNH.split(_TOKENS_AT_A_TIME, dim=1):
        own_nV = _log_probabilities(head, inputs_CnH[0])
        for copy, changed_nH in enumerate(inputs_CnH[1:]):
            changed_nV = _log_probabilities(head, changed_nH)
            totals[copy] += F.kl_div(changed_nV, own_nV, reduction="sum", log_target=True).double()
    return (totals / inputs_CNH.shape[1]).tolist()


def _log_probabilities(head: nn.Module, inputs_nH: Tensor) -> Tensor:
    return head(inputs_nH).float().log_softmax(-1)
