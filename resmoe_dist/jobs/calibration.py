"""Measure a source model's activations with one expert in memory at a time.

transformers loads and runs the model; in place of each experts module stands one that reads expert
after expert from the checkpoint, so that no layer's experts are ever held together.

Legend: B batch, S sequence, T tokens, K experts per token, E experts, R tokens of one expert,
H hidden, I intermediate rows, D design-matrix columns.
"""

from __future__ import annotations

import copy
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
from resmoe_dist.design_matrix import from_rows
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.perplexity import sequences_from_text
from resmoe_dist.families.models import model_class
from resmoe_dist.families.sites import ExpertsAdapter, adapter_for, replace_experts

DEFAULT_TOKENS = 4096
DEFAULT_CONTEXT = 256

_METHOD = "resmoe_calibration"
# In float64 a block of an expert's activations takes eight bytes a value: few rows at a time.
_ROWS_PER_SUM = 512

# transformers calls the quantizer from inside `from_pretrained`, which has no argument for it.
_source: ContextVar[SourceCheckpoint] = ContextVar("source")


def calibration_sequences(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int = DEFAULT_TOKENS,
    context: int = DEFAULT_CONTEXT,
) -> list[list[int]]:
    """The first `tokens` tokens of a text file in windows of `context`, fewer where it is shorter.

    All are of one length, so that `measure_activations` reads each expert once: a shorter last
    window is left out unless it is the only one. Raises UserError as `sequences_from_text` does.
    """
    windows = sequences_from_text(path, tokenizer, min(context, tokens))[
        : max(1, tokens // context)
    ]
    return [window for window in windows if len(window) == len(windows[0])]


@torch.no_grad()
def measure_activations(
    source: SourceCheckpoint, sequences: list[list[int]], *, progress: bool = True
) -> list[LayerActivations]:
    """Statistics of each of `source.sites`, in their order, on sequences of token ids.

    The model computes in the dtype that config.json names, as transformers runs it; sums are taken
    in float64. Sequences of one length go through together, so each expert is read once per length;
    an encoder-decoder model reads the first half of a sequence and decodes the second. Nothing is
    padded. progress: show a bar where standard error is a terminal.

    In memory: one dense expert, the activations of all tokens of one layer, and the weights that
    are no expert's (Mixtral-8x7B: 3.2 GB in bf16). Those are mapped from the checkpoint's files, so
    the system may drop any page of them; but held, where they are stored in float8 or another dtype
    than config.json's, or where transformers merges them.

    Raises UserError for a checkpoint that is damaged or incomplete, or activations that are not
    finite.
    """
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for sequence in sequences:
        by_length[len(sequence)].append(sequence)
    model = _load_measured(source)
    experts = [model.get_submodule(site.module) for site in source.sites]
    # None lets tqdm decide: no bar where standard error is no terminal.
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
            _run_without_head(model, torch.tensor(batch))
    return [module.activations() for module in experts]


class _MeasuredExperts(nn.Module):
    """Stands in for an experts module: reads one expert at a time, runs it and adds up squares."""

    def __init__(
        self,
        source: SourceCheckpoint,
        layer: int,
        adapter: type[ExpertsAdapter],
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.source = source
        self.layer = layer
        self.activation = activation
        site = source.sites[layer]
        # No buffers, and not on the meta device where the rest of the model is made: transformers
        # empties what it finds there.
        self.tokens = 0
        with torch.device("cpu"):
            self.tokens_E = torch.zeros(site.num_experts, dtype=torch.int64)
            self.input_squares_H = torch.zeros(site.shape.hidden, dtype=torch.float64)
            self.neuron_squares_EI = torch.zeros(
                site.num_experts, site.shape.rows, dtype=torch.float64
            )

    def forward(self, *arguments: Tensor) -> Tensor:
        """As the model calls its experts: hidden states [T, H] and routing -> [T, H]."""
        hidden_states, top_k_index, top_k_weights = self.adapter.routing(*arguments)
        self.tokens += hidden_states.shape[0]
        self.input_squares_H += _sum_of_squares(hidden_states)
        out_TH = torch.zeros_like(hidden_states)
        for expert in range(len(self.tokens_E)):
            token_R, slot_R = torch.where(top_k_index == expert)
            if len(token_R):
                y_RH = self._run(expert, hidden_states[token_R])
                y_RH = y_RH * top_k_weights[token_R, slot_R, None]
                out_TH.index_add_(0, token_R, y_RH.to(out_TH.dtype))
        return out_TH

    def _run(self, expert: int, x_RH: Tensor) -> Tensor:
        # The expert is freed on return, before the next one is read.
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
        """What was measured so far. Raises UserError where it is not finite."""
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


class _MeasuringQuantizer(HfQuantizer):
    """Takes the experts out of a model that `from_pretrained` is loading."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        source = _source.get()
        for layer, site in enumerate(source.sites):
            original = model.get_submodule(site.module)
            adapter = adapter_for(original)
            assert adapter is not None
            measured = _MeasuredExperts(source, layer, adapter, adapter.activation(original))
            replace_experts(model, site.module, measured)

    def is_serializable(self) -> bool:
        """The model lives for one measurement."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(_METHOD)(_MeasuringQuantizer)


def _load_measured(source: SourceCheckpoint) -> PreTrainedModel:
    """The source model with measuring experts, its other weights mapped from their files."""
    config = copy.deepcopy(source.config)
    # Float8 weights arrive dequantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    token = _source.set(source)
    try:
        # The tensors rather than the folder, whose experts' it would report as unexpected.
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
    # transformers fills what a checkpoint lacks with random values.
    mismatched = (str(entry[0]) for entry in found["mismatched_keys"])
    if wrong := sorted({*found["missing_keys"], *mismatched}):
        raise UserError(
            f"{source.folder}: tensor {wrong[0]!r} is missing or of another shape than config.json "
            "asks for; fetch the model again"
        )
    return model.eval()


def _other_tensors(source: SourceCheckpoint) -> dict[str, Tensor]:
    """All tensors that are no expert's, by name."""
    names_in: dict[str, list[str]] = defaultdict(list)
    for name in source.other_names:
        names_in[source.files.locations[name]].append(name)
    tensors = {}
    for file_name, names in names_in.items():
        file = source.files.file(file_name)
        # `TensorFile` copies what it reads; what safetensors reads for torch stays mapped.
        with safe_open(str(file.path), framework="pt") as mapped:
            for name in names:
                scaled = file.dtype(name).startswith("F8")
                tensors[name] = source.read_other(name) if scaled else mapped.get_tensor(name)
    return tensors


def _run_without_head(model: PreTrainedModel, ids_BS: Tensor) -> None:
    """A forward pass up to the last hidden states: logits would take tokens x vocabulary."""
    decoder = model.get_decoder()
    if not model.config.is_encoder_decoder:
        decoder(input_ids=ids_BS, use_cache=False)
        return
    half = ids_BS.shape[1] // 2
    encoded = model.get_encoder()(input_ids=ids_BS[:, :half]).last_hidden_state
    # The decoder is to predict the second half: its input is that, shifted by a start token.
    decoder_ids_BS = ids_BS[:, half - 1 : -1].clone()
    decoder_ids_BS[:, 0] = model.config.decoder_start_token_id
    decoder(input_ids=decoder_ids_BS, encoder_hidden_states=encoded, use_cache=False)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Of each column, in float64."""
    return sum(block.double().square().sum(0) for block in x.split(_ROWS_PER_SUM))
