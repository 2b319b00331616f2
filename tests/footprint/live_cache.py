"""The KV cache of a model that runs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tests.models import VOCABULARY


@torch.no_grad()
def live_cache_bytes(model: PreTrainedModel, batch: int, tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens, the last one decoded alone, as by `generate`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    if model.config.is_encoder_decoder:
        cache = model(input_ids=ids, decoder_input_ids=ids).past_key_values
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    else:
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        layers = model(input_ids=ids[:, -1:], past_key_values=cache).past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
