"""Run a model with one expert in memory at a time.

transformers loads and runs the model. Its experts modules are replaced by stand-ins that read one
expert after the other.

Legend: B batch, S sequence, T tokens, K experts per token, R received rows (the tokens of one
expert), H hidden, I intermediate rows.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.errors import UserError
from resmoe_dist.families.adapters import ExpertsAdapter, adapter_for
from resmoe_dist.families.models import model_class
from resmoe_dist.families.sites import replace_experts
from resmoe_dist.runtime.folder_checks import refusing

_METHOD = "resmoe_streaming"


@dataclass(frozen=True)
class ExpertReader:
    """Reads one layer. read: design matrix [I, D] and output bias [H] of an expert."""

    num_experts: int
    shape: ExpertShape
    read: Callable[[int], tuple[Tensor, Tensor | None]]

    @classmethod
    def of_source(cls, source: SourceCheckpoint, layer: int) -> ExpertReader:
        """Reads a layer of the model as it was. layer: position in `source.sites`."""
        site = source.sites[layer]
        return cls(site.num_experts, site.shape, partial(source.read_expert, layer))


class StreamedExperts(nn.Module):
    """Replaces an experts module: reads and runs one expert at a time."""

    def __init__(
        self, reader: ExpertReader, adapter: ExpertsAdapter, activation: nn.Module
    ) -> None:
        super().__init__()
        self.reader, self.adapter, self.activation = reader, adapter, activation

    def forward(self, *arguments: Tensor) -> Tensor:
        """Run all experts on the arguments of the model's experts module -> [T, H]."""
        return self.adapter.call(self._run, *arguments)

    def see_tokens(self, inputs_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """Called with the tokens of each call. Subclasses keep what they need."""

    def see_neurons(self, expert: int, h_RI: Tensor) -> None:
        """Called with what an expert's activation returns. Subclasses keep what they need."""

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.see_tokens(hidden_states, top_k_index, top_k_weights)
        out_TH = torch.zeros_like(hidden_states)
        for expert in range(self.reader.num_experts):
            token_R, slot_R = torch.where(top_k_index == expert)
            if len(token_R):
                y_RH = self.run_expert(expert, hidden_states[token_R], token_R)
                y_RH = y_RH * top_k_weights[token_R, slot_R, None]
                out_TH.index_add_(0, token_R, y_RH.to(out_TH.dtype))
        return out_TH

    def run_expert(self, expert: int, x_RH: Tensor, token_R: Tensor) -> Tensor:
        """The output [R, H] of an expert. token_R: which tokens of the call it receives."""
        # Returning frees the expert before the next one is read.
        return self.run_with(expert, *self.reader.read(expert), x_RH)

    def run_with(
        self, expert: int, matrix_ID: Tensor, bias_H: Tensor | None, x_RH: Tensor
    ) -> Tensor:
        """The output [R, H] of an expert with this design matrix."""
        shape = self.reader.shape
        weights = from_rows(shape, matrix_ID.to(x_RH.dtype))
        inputs = [F.linear(x_RH, weights[n], weights.get(f"{n}_bias")) for n in shape.inputs]
        h_RI = self.activation(*inputs)
        self.see_neurons(expert, h_RI)
        bias_H = None if bias_H is None else bias_H.to(x_RH.dtype)
        return F.linear(h_RI, weights[shape.output], bias_H)


# Makes the stand-in of a layer from its number, its adapter and its activation.
MakeExperts = Callable[[int, ExpertsAdapter, nn.Module], StreamedExperts]

# The quantizer's source and stand-ins: `from_pretrained` calls the quantizer and has no argument to
# pass them.
_loading: ContextVar[tuple[SourceCheckpoint, MakeExperts]] = ContextVar("loading")


class _StreamingQuantizer(HfQuantizer):
    """Replaces the experts modules of a model while `from_pretrained` loads it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        source, make = _loading.get()
        for layer, site in enumerate(source.sites):
            original = model.get_submodule(site.module)
            adapter = adapter_for(original)
            assert adapter is not None
            streamed = make(layer, adapter, adapter.activation(original))
            for module in site.modules:
                replace_experts(model, module, streamed)

    def is_serializable(self) -> bool:
        """No: the model is only run."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: inference only."""
        return False


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(_METHOD)(_StreamingQuantizer)


def load_streamed(
    source: SourceCheckpoint, make: MakeExperts, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load the source model with stand-ins for its experts, in eval mode.

    make: makes the stand-in of each layer. dtype: to compute in; None is that of config.json.

    The other weights are mapped from the checkpoint's files, so the system can drop their pages.
    They are copied into memory if they are stored in float8, if their dtype differs from the one to
    compute in, or if transformers merges them.

    Raises UserError if a tensor is missing or has another shape.
    """
    config = copy.deepcopy(source.config)
    token = _loading.set((source, make))
    try:
        # A state dict instead of the folder: its expert tensors would be reported as unexpected.
        model, found = model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=_other_tensors(source),
            dtype=dtype or "auto",
            quantization_config=QuantizationConfigMixin(quant_method=_METHOD),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        _loading.reset(token)
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


@torch.no_grad()
def run_streamed(
    source: SourceCheckpoint,
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    description: str,
    *,
    progress: bool = True,
    with_head: bool = False,
) -> None:
    """Run a model of `load_streamed` on batches of token ids [B, S], up to the last hidden states.

    description: of the progress bar, which is shown on a terminal if `progress` is set. with_head:
    run the head too. An encoder-decoder model encodes the first half of each sequence and decodes
    the second.

    Raises UserError if the model does not run.
    """
    experts = [model.get_submodule(site.module) for site in source.sites]
    # disable=None: tqdm shows the bar only on a terminal.
    with tqdm(
        total=len(experts) * len(batches),
        desc=description,
        unit="layer",
        disable=None if progress else True,
    ) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        hooks = [module.register_forward_hook(advance) for module in experts]
        for ids_BS in batches:
            with refusing(source.folder, "the model does not run on the calibration text"):
                _run_model(model, ids_BS, with_head)
        for hook in hooks:
            hook.remove()


def _run_model(model: PreTrainedModel, ids_BS: Tensor, with_head: bool) -> None:
    """Run a forward pass. Without the head: logits would take [B, S, vocabulary]."""
    decoder = model.get_decoder()
    if "decoder_input_ids" in inspect.signature(decoder.forward).parameters:
        # A model that reads a context and denoises what follows.
        half = ids_BS.shape[1] // 2
        model.base_model(input_ids=ids_BS[:, :half], decoder_input_ids=ids_BS[:, half:])
        return
    if not model.config.is_encoder_decoder:
        (model if with_head else decoder)(input_ids=ids_BS, use_cache=False)
        return
    half = ids_BS.shape[1] // 2
    # To predict the second half, the decoder reads a start token, then all but the last token.
    decoder_ids_BS = ids_BS[:, half - 1 : -1].clone()
    decoder_ids_BS[:, 0] = model.config.decoder_start_token_id
    if with_head:
        model(input_ids=ids_BS[:, :half], decoder_input_ids=decoder_ids_BS, use_cache=False)
        return
    encoded = model.get_encoder()(input_ids=ids_BS[:, :half]).last_hidden_state
    decoder(input_ids=decoder_ids_BS, encoder_hidden_states=encoded, use_cache=False)
