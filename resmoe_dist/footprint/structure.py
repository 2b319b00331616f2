"""What a config says about a model: its experts, the bytes of everything else, its KV cache.

transformers builds the model on the meta device, which has shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from resmoe_dist.errors import UserError, first_line
from resmoe_dist.families.models import load_config, meta_model
from resmoe_dist.families.sites import find_expert_sites, replace_experts
from resmoe_dist.families.storage import ExpertSite
from resmoe_dist.families.unsupported import no_experts
from resmoe_dist.registration import QUANT_METHOD


@dataclass(frozen=True)
class ModelStructure:
    """A model without its weights.

    model: on the meta device, without its experts. parameters: their number, experts included.
    dtype: in memory. source_dtype: of the files it comes in. others: parameters and buffers that
    are not experts', by name, on the meta device and in the dtype they have in memory.
    other_stored_bytes: of the same in the source's files. cache_by_layer: bytes of each layer's KV
    cache, of one sequence of `context` tokens. quantization: how the source itself is quantised,
    or None.
    """

    model: PreTrainedModel
    parameters: int
    dtype: torch.dtype
    source_dtype: torch.dtype
    sites: tuple[ExpertSite, ...]
    others: dict[str, Tensor]
    other_stored_bytes: int
    context: int
    cache_by_layer: tuple[int, ...]
    quantization: str | None = None

    @property
    def kind(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def other_bytes(self) -> int:
        """Bytes in memory of what is not an expert's."""
        return sum(tensor.nbytes for tensor in self.others.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache of one sequence."""
        return sum(self.cache_by_layer)


def read_structure(path: Path, context: int, dtype: torch.dtype | None = None) -> ModelStructure:
    """The structure of a model folder or a config.json.

    context: tokens in the KV cache of a sequence; 0 leaves the cache out. dtype: in memory, the
    config's by default. Raises UserError for a config that cannot be read, a family that
    transformers does not have, or a model without experts.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a model folder or a config.json")
    config = load_config(str(path))
    source_dtype = config.dtype or config.get_text_config().dtype or torch.float32
    config.dtype = dtype or source_dtype
    model = meta_model(config).eval()
    sites = find_expert_sites(model)
    if not sites:
        raise no_experts(str(path), model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for site in sites:
        for module in site.modules:
            replace_experts(model, module, _NoExperts())
    others = dict(_tensors(model))
    stored = model.state_dict().keys() & others.keys()
    try:
        cache_by_layer = _cache_by_layer(model, context) if context else ()
    except Exception as error:  # whatever a family does that the meta device cannot
        raise UserError(
            f"{path}: the KV cache of a {type(model).__name__} cannot be worked out "
            f"({type(error).__name__}: {first_line(error)}); leave it out with --context 0"
        ) from error
    return ModelStructure(
        model=model,
        parameters=parameters,
        dtype=config.dtype,
        source_dtype=source_dtype,
        sites=tuple(sites),
        others=others,
        other_stored_bytes=sum(_nbytes(others[name], source_dtype) for name in stored),
        context=context,
        cache_by_layer=cache_by_layer,
        quantization=_quantization(config),
    )


class _NoExperts(nn.Module):
    """Stands for experts, whose products the meta device need not run. Output [T, H]."""

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, shared ones once, in the dtype that loading gives them."""
    in_float32 = set(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        in_float32 |= set(model._keep_in_fp32_modules or ())
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            kept = tensor.is_floating_point() and not in_float32.isdisjoint(name.split("."))
            yield name, tensor.float() if kept else tensor


def _nbytes(tensor: Tensor, dtype: torch.dtype) -> int:
    """Bytes of a tensor whose floating-point values are stored as `dtype`."""
    itemsize = dtype.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize
    return tensor.numel() * itemsize


@torch.no_grad()
def _cache_by_layer(model: PreTrainedModel, context: int) -> tuple[int, ...]:
    """Bytes that transformers caches in each layer for one sequence of `context` tokens.

    The model runs on the meta device, so layers with latent, windowed or recurrent states count as
    their family caches them. An encoder-decoder reads and writes `context` tokens.
    """
    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    if model.config.is_encoder_decoder:
        cache = model(input_ids=ids, decoder_input_ids=ids).past_key_values
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    else:
        parts = [model(input_ids=ids, use_cache=True).past_key_values]
    layers = zip(*(part.layers for part in parts), strict=True)
    return tuple(sum(_state_bytes(vars(state)) for state in states) for states in layers)


def _state_bytes(state: Any) -> int:
    """Bytes of the tensors in a cache layer's attributes, also in lists and dicts.

    Scalars are bookkeeping, such as the window's size.
    """
    if isinstance(state, Tensor):
        return state.nbytes if state.dim() else 0
    if isinstance(state, dict):
        state = list(state.values())
    return sum(map(_state_bytes, state)) if isinstance(state, list | tuple) else 0


def _quantization(config: PretrainedConfig) -> str | None:
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return None if method == QUANT_METHOD else str(method)
