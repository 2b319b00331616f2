"""The KV cache that `plan` predicts is what a model caches when it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resmoe_dist.footprint.structure import read_structure
from tests.footprint.live_cache import live_cache_bytes
from tests.models import FAMILIES, dense_model, save_family

MODELS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FAMILIES}
MODELS |= {
    "sliding mixtral": ("mixtral", {"sliding_window": 7}),
    "sliding gpt_oss": ("gpt_oss", {"sliding_window": 7}),
    "grouped queries": ("mixtral", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [5, 19])
def test_cache_of_every_family(tmp_path, name, tokens):
    family, overrides = MODELS[name]
    save_family(FAMILIES[family], tmp_path, **overrides)

    predicted = read_structure(tmp_path, context=tokens).cache_bytes

    assert 3 * predicted == live_cache_bytes(dense_model(tmp_path), 3, tokens)


def test_a_narrower_dtype_halves_the_cache(family_folder):
    folder = family_folder("mixtral")

    whole = read_structure(folder, context=9).cache_bytes
    half = read_structure(folder, context=9, dtype=torch.bfloat16).cache_bytes

    assert whole == 2 * half == 2 * 2 * 9 * 2 * 10 * 4


def test_latent_attention_caches_the_latent_and_the_rotated_keys(tmp_path):
    values = {"kv_lora_rank": 8, "qk_rope_head_dim": 4}
    save_family(FAMILIES["deepseek_v3"], tmp_path, **values)

    assert read_structure(tmp_path, context=9).cache_bytes == 2 * 9 * (8 + 4) * 4


def test_no_context_needs_no_cache(family_folder):
    assert read_structure(family_folder("mixtral"), context=0).cache_bytes == 0
