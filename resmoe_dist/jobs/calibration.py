"""Measure a source model's activations with one expert in memory at a time.

transformers loads and runs the model. Its experts modules are replaced by stand-ins that read one
expert after the other from the checkpoint.

Legend: B batch, S sequence, T tokens, K experts per token, E experts, R received rows (the tokens
of one expert), H hidden, I intermediate rows, D design-matrix columns.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.compression.activations import LayerActivations
from resmoe_dist.compression.samples import LayerSamples, SampleFiles
from resmoe_dist.design_matrix import from_rows
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import sequences_from_text
from resmoe_dist.families.adapters import ExpertsAdapter, adapter_for
from resmoe_dist.families.models import model_class
from resmoe_dist.families.routers import RouterOutput, router_outputs
from resmoe_dist.families.sites import replace_experts
from resmoe_dist.runtime.folder_checks import refusing

DEFAULT_TOKENS = 4096
DEFAULT_CONTEXT = 256

_METHOD = "resmoe_calibration"
# Squares are summed in float64 in blocks of so many rows, which bounds the memory they take.
_ROWS_PER_SUM = 512

# The quantizer's source: `from_pretrained` calls the quantizer and has no argument to pass it.
_source: ContextVar[SourceCheckpoint] = ContextVar("source")


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


@torch.no_grad()
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
    the experts (Mixtral-8x7B: 3.2 GB in bf16). Those weights are mapped from the checkpoint's
    files, so the system can drop their pages. They are copied into memory if they are stored in
    float8, if their dtype differs from config.json's, or if transformers merges them.

    Raises UserError if the checkpoint is damaged or incomplete, or if activations are not finite.
    """
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for sequence in sequences:
        by_length[len(sequence)].append(sequence)
    model = _load_measured(source)
    experts = [model.get_submodule(site.module) for site in source.sites]
    if samples is not None:
        for module, router in zip(experts, router_outputs(model, source.sites), strict=True):
            module.keep_samples(samples, router)
    # disable=None: tqdm shows the bar only on a terminal.
    with tqdm(
        total=len(experts) * len(by_length),
        desc="measuring activations",
        unit="layer",
        disable=None if progress else True,
    ) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        for module in experts:
            module.register_forward_hook(advance)
        for batch in by_length.values():
            with refusing(source.folder, "the model does not run on the calibration text"):
                _run_without_head(model, torch.tensor(batch))
    return [module.activations() for module in experts]


class _MeasuredExperts(nn.Module):
    """Replaces an experts module: reads and runs one expert at a time and sums up squares."""

    def __init__(
        self,
        source: SourceCheckpoint,
        layer: int,
        adapter: ExpertsAdapter,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.source = source
        self.layer = layer
        self.activation = activation
        site = source.sites[layer]
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

    def forward(self, *arguments: Tensor) -> Tensor:
        """Run all experts on the arguments of the model's experts module -> [T, H]."""
        return self.adapter.call(self._run, *arguments)

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.tokens += hidden_states.shape[0]
        if self._recorder is not None:
            self._recorder.add_tokens(hidden_states, top_k_index, top_k_weights)
        self.input_squares_H += _sum_of_squares(hidden_states)
        out_TH = torch.zeros_like(hidden_states)
        for expert in range(len(self.tokens_E)):
            token_R, slot_R = torch.where(top_k_index == expert)
            if len(token_R):
                y_RH = self._run_expert(expert, hidden_states[token_R])
                y_RH = y_RH * top_k_weights[token_R, slot_R, None]
                out_TH.index_add_(0, token_R, y_RH.to(out_TH.dtype))
        return out_TH

    def _run_expert(self, expert: int, x_RH: Tensor) -> Tensor:
        # Returning frees the expert before the next one is read.
        shape = self.source.sites[self.layer].shape
        matrix_ID, bias_H = self.source.read_expert(self.layer, expert)
        matrix_ID = matrix_ID.to(x_RH.dtype)
        weights = from_rows(shape, matrix_ID)
        inputs = [F.linear(x_RH, weights[n], weights.get(f"{n}_bias")) for n in shape.inputs]
        h_RI = self.activation(*inputs)
        self.tokens_E[expert] += len(x_RH)
        self.neuron_squares_EI[expert] += _sum_of_squares(h_RI)
        bias_H = None if bias_H is None else bias_H.to(x_RH.dtype)
        return F.linear(h_RI, weights[shape.output], bias_H)

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


class _MeasuringQuantizer(HfQuantizer):
    """Replaces the experts modules of a model while `from_pretrained` loads it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        source = _source.get()
        for layer, site in enumerate(source.sites):
            original = model.get_submodule(site.module)
            adapter = adapter_for(original)
            assert adapter is not None
            measured = _MeasuredExperts(source, layer, adapter, adapter.activation(original))
            for module in site.modules:
                replace_experts(model, module, measured)

    def is_serializable(self) -> bool:
        """No: the model is used for one measurement only."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: inference only."""
        return False


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(_METHOD)(_MeasuringQuantizer)


def _load_measured(source: SourceCheckpoint) -> PreTrainedModel:
    """Load the source model with measuring experts; other weights are mapped from their files."""
    config = copy.deepcopy(source.config)
    token = _source.set(source)
    try:
        # A state dict instead of the folder: its expert tensors would be reported as unexpected.
        model, found = model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=_other_tensors(source),
            dtype="auto",
            quantization_config=QuantizationConfigMixin(quant_method=_METHOD),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        _source.reset(token)
    # Refuse what transformers would fill with random values.
    mismatched = (str(entry[0]) for entry in found["mismatched_keys"])
    if wrong := sorted({*found["missing_keys"], *mismatched}):
        raise UserError(
            f"{source.folder}: tensor {wrong[0]!r} is missing or its shape differs from "
            "config.json; fetch the model again"
        )
    return model.eval()


def _other_tensors(source: SourceCheckpoint) -> dict[str, Tensor]:
    """Return all tensors outside the experts, by name."""
    names_by_file: dict[str, list[str]] = defaultdict(list)
    for name in source.other_names:
        names_by_file[source.files.locations[name]].append(name)
    tensors = {}
    for file_name, names in names_by_file.items():
        file = source.files.file(file_name)
        # safetensors maps tensors from the file; `TensorFile` would copy them.
        with safe_open(str(file.path), framework="pt") as mapped:
            for name in names:
                is_float8 = file.dtype(name).startswith("F8")
                tensors[name] = source.read_other(name) if is_float8 else mapped.get_tensor(name)
    return tensors


def _run_without_head(model: PreTrainedModel, ids_BS: Tensor) -> None:
    """Run a forward pass up to the last hidden states: logits would take [B, S, vocabulary]."""
    decoder = model.get_decoder()
    if "decoder_input_ids" in inspect.signature(decoder.forward).parameters:
        # A model that reads a context and denoises what follows.
        half = ids_BS.shape[1] // 2
        model.base_model(input_ids=ids_BS[:, :half], decoder_input_ids=ids_BS[:, half:])
        return
    if not model.config.is_encoder_decoder:
        decoder(input_ids=ids_BS, use_cache=False)
        return
    half = ids_BS.shape[1] // 2
    encoded = model.get_encoder()(input_ids=ids_BS[:, :half]).last_hidden_state
    # To predict the second half, the decoder reads a start token, then all but the last token.
    decoder_ids_BS = ids_BS[:, half - 1 : -1].clone()
    decoder_ids_BS[:, 0] = model.config.decoder_start_token_id
    decoder(input_ids=decoder_ids_BS, encoder_hidden_states=encoded, use_cache=False)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each column, in float64."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for block in x.split(_ROWS_PER_SUM):
        total += block.double().square().sum(0)
    return total
