"""Measure a source model's activations with one expert in memory at a time.

Legend: T tokens, K experts per token, E experts, R received rows (the tokens of one expert),
H hidden, I intermediate rows.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.samples import LayerSamples, SampleFiles
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import sequences_from_text
from resmoe_dist.families.adapters import ExpertsAdapter
from resmoe_dist.families.routers import RouterOutput, router_outputs
from resmoe_dist.jobs.streaming import ExpertReader, StreamedExperts, load_streamed, run_streamed

DEFAULT_TOKENS = 4096
DEFAULT_CONTEXT = 256

# Squares are summed in float64 in blocks of so many rows, which bounds the memory they take.
_ROWS_PER_SUM = 512


def calibration_sequences(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int = DEFAULT_TOKENS,
    context: int = DEFAULT_CONTEXT,
) -> list[list[int]]:
    """Return the first `tokens` tokens of a text file, cut into windows of `context` tokens.

    A shorter text gives fewer windows. All windows have the same length, so `measure_activations`
    reads each expert once; a shorter last window is dropped unless it is the only one.

    Raises UserError as `sequences_from_text` does.
    """
    count = max(1, tokens // context)
    windows = sequences_from_text(path, tokenizer, min(context, tokens))[:count]
    return [window for window in windows if len(window) == len(windows[0])]


def measure_activations(
    source: SourceCheckpoint,
    sequences: list[list[int]],
    *,
    samples: SampleFiles | None = None,
    progress: bool = True,
) -> list[LayerActivations]:
    """Measure the activation statistics of all `source.sites` on sequences of token ids.

    samples: where to store every token's inputs and routing; None stores none. progress: show a
    progress bar if standard error is a terminal.

    The model computes in the dtype of config.json, as in transformers; squares are summed in
    float64. Sequences of the same length form one batch, so each expert is read once per length,
    and nothing is padded. An encoder-decoder model encodes the first half of each sequence and
    decodes the second.

    Memory: one dense expert, the activations of one layer for all tokens, and the weights outside
    the experts (Mixtral-8x7B: 3.2 GB in bf16), which are mapped from files if possible (see
    `load_streamed`).

    Raises UserError if the checkpoint is damaged or incomplete, or if activations are not finite.
    """
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for sequence in sequences:
        by_length[len(sequence)].append(sequence)

    def make(layer: int, adapter: ExpertsAdapter, activation: nn.Module) -> _MeasuredExperts:
        return _MeasuredExperts(source, layer, adapter, activation)

    model = load_streamed(source, make)
    experts = [model.get_submodule(site.module) for site in source.sites]
    if samples is not None:
        for module, router in zip(experts, router_outputs(model, source.sites), strict=True):
            module.keep_samples(samples, router)
    batches = [torch.tensor(batch) for batch in by_length.values()]
    run_streamed(source, model, batches, "measuring activations", progress=progress)
    return [module.activations() for module in experts]


class _MeasuredExperts(StreamedExperts):
    """Reads and runs one expert at a time and sums up squares."""

    def __init__(
        self,
        source: SourceCheckpoint,
        layer: int,
        adapter: ExpertsAdapter,
        activation: nn.Module,
    ) -> None:
        site = source.sites[layer]
        super().__init__(ExpertReader.of_source(source, layer), adapter, activation)
        self.source, self.layer = source, layer
        # Plain attributes on the CPU: transformers builds the model on the meta device, and
        # replaces all buffers by uninitialised ones.
        self.tokens = 0
        self._recorder: _SampleRecorder | None = None
        with torch.device("cpu"):
            self.tokens_E = torch.zeros(site.num_experts, dtype=torch.int64)
            self.input_squares_H = torch.zeros(site.shape.hidden, dtype=torch.float64)
            self.neuron_squares_EI = torch.zeros(
                site.num_experts, site.shape.rows, dtype=torch.float64
            )

    def keep_samples(self, files: SampleFiles, router: RouterOutput | None) -> None:
        """Store what every later call receives. router: where to see its logits, if known."""
        self._recorder = _SampleRecorder(files, self.layer, len(self.tokens_E), router)

    def see_tokens(self, inputs_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        self.tokens += len(inputs_TH)
        if self._recorder is not None:
            self._recorder.add_tokens(inputs_TH, index_TK, weights_TK)
        self.input_squares_H += _sum_of_squares(inputs_TH)

    def see_neurons(self, expert: int, h_RI: Tensor) -> None:
        self.tokens_E[expert] += len(h_RI)
        self.neuron_squares_EI[expert] += _sum_of_squares(h_RI)

    def activations(self) -> LayerActivations:
        """Return the statistics so far. Raises UserError if any is not finite.

        Experts without tokens get the mean of the others.
        """
        used_E = self.tokens_E > 0
        input_rms_H = torch.ones_like(self.input_squares_H)
        if self.tokens:
            input_rms_H = (self.input_squares_H / self.tokens).sqrt()
        neuron_rms_EI = torch.ones_like(self.neuron_squares_EI)
        if used_E.any():
            neuron_rms_EI = (self.neuron_squares_EI / self.tokens_E.unsqueeze(1)).sqrt()
            neuron_rms_EI[~used_E] = neuron_rms_EI[used_E].mean(0)
        for rms in (input_rms_H, neuron_rms_EI):
            if not torch.isfinite(rms).all():
                raise UserError(
                    f"{self.source.folder}: activations at {self.source.sites[self.layer].module} "
                    "are NaN or infinite; the model diverges on this text or overflows its dtype"
                )
        return LayerActivations(
            input_rms_H=input_rms_H.float(),
            neuron_rms_EI=neuron_rms_EI.float(),
            tokens_E=self.tokens_E.clone(),
        )


class _SampleRecorder:
    """Stores the samples of one layer as soon as its router and its experts have run."""

    def __init__(
        self, files: SampleFiles, layer: int, experts: int, router: RouterOutput | None
    ) -> None:
        self._files, self._layer, self._parts = files, layer, 0
        self._has_logits = router is not None
        self._logits_TE: Tensor | None = None
        self._tokens: dict[str, Tensor] = {}
        if router is not None:

            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                self._logits_TE = router.logits(output, experts)
                self._write()

            router.module.register_forward_hook(keep)

    def add_tokens(self, inputs_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """The arguments of one call of the experts."""
        self._tokens = {"inputs_TH": inputs_TH, "index_TK": index_TK, "weights_TK": weights_TK}
        self._write()

    def _write(self) -> None:
        if not self._tokens or (self._logits_TE is None and self._has_logits):
            return
        samples = LayerSamples(**self._tokens, logits_TE=self._logits_TE)
        self._files.write(self._layer, self._parts, samples)
        self._parts += 1
        self._tokens, self._logits_TE = {}, None


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each column, in float64."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for block in x.split(_ROWS_PER_SUM):
        total += block.double().square().sum(0)
    return total
