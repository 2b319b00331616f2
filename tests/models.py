"""Randomly initialised tiny models of the families the tests cover, and how to compress them.

Sizes are odd on purpose: I no multiple of 2 or 8, H no multiple of 16, D no multiple of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from resmoe_dist.checkpoints.format import CheckpointIndex
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.families.models import load_config, model_class
from resmoe_dist.jobs.pipeline import Compression
from tests.compress_settings import compression_settings

VOCABULARY = 64
_COMMON = {
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """A config class and model class of transformers by name, and the config's values."""

    config: str
    model: str
    values: dict[str, Any]


FAMILIES = {
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        _COMMON | {"intermediate_size": 27, "num_local_experts": 4},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _COMMON
        | {
            "intermediate_size": 24,
            "moe_intermediate_size": 13,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _COMMON
        | {
            "intermediate_size": 24,
            "moe_intermediate_size": 11,
            "num_experts": 4,
            "head_dim": 10,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": Family(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        _COMMON | {"intermediate_size": 17, "num_experts": 4},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        _COMMON | {"intermediate_size": 19, "num_local_experts": 4, "head_dim": 10},
    ),
    "switch": Family(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "d_model": 20,
            "d_ff": 27,
            "d_kv": 10,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "num_heads": 2,
            "num_experts": 4,
            "expert_capacity": 64,
            "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0,
        },
    ),
}


def save_family(family: Family, folder: Path, *, fused: bool = False, **overrides: Any) -> None:
    """Save a random float32 model; `fused` writes experts as transformers v5 holds them."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**(family.values | overrides))
    model = getattr(transformers, family.model)(config)
    for name, parameter in model.named_parameters():
        # Large enough, biases and routers included, that every tensor matters to the logits.
        spread = 0.5 if "norm" not in name else 0.1
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, spread)
    model.save_pretrained(folder, save_original_format=not fused)


def dense_model(folder: Path) -> transformers.PreTrainedModel:
    """The model of a plain folder, in eval mode, by transformers alone.

    Its experts run eagerly: transformers' grouped products refuse odd sizes.
    """
    kind = model_class(load_config(str(folder)))
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def compress(source: Path, output: Path, groups: int = 1, **settings: Any) -> CheckpointIndex:
    """Compress with the defaults of `compression_settings`; all layers unless `settings` say."""
    checkpoint = SourceCheckpoint(source)
    values = {"layers": list(range(len(checkpoint.sites)))} | settings
    chosen = compression_settings(groups=groups, **values)
    return Compression(checkpoint, output, chosen).run()


def random_sequences(*lengths: int) -> list[list[int]]:
    """Sequences of random token ids, one of each length."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def logits_of(model: transformers.PreTrainedModel, batch: int = 2, length: int = 9) -> torch.Tensor:
    """Logits of a fixed random batch; for an encoder-decoder of fixed decoder inputs too."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, : length // 2 + 1]
    with torch.no_grad():
        return model(**inputs).logits


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())
