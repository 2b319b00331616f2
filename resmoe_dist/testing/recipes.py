"""Architecture and training schedule of each family's tiny model.

The dense model that is upcycled has the family's architecture with a single expert, so all families
are trained the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from resmoe_dist.testing.corpus import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE

# Part of the cache key: increase it when a change alters the trained model.
RECIPE_VERSION = 4


@dataclass(frozen=True)
class Recipe:
    """One family's architecture and training schedule."""

    config: dict[str, Any]  # of the MoE model, as the family's config class names its fields
    one_expert: dict[str, Any]  # what to change in `config` for the dense model
    top_k: int = 1  # experts per token, as in `config`
    balance: float = 0.02  # weight of the load-balancing loss; 0 where a selection bias balances
    encoder_decoder: bool = False
    dense_steps: int = 400
    moe_steps: int = 220
    batch_size: int = 8  # crops per step
    crop_length: int = 256  # tokens per crop
    muon_lr: float = 0.005
    expert_lr: float = 0.003  # AdamW's, for the experts
    adamw_lr: float = 0.01  # AdamW's, for tables, norms and routers


_COMMON = dict(
    vocab_size=VOCABULARY_SIZE,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
    pad_token_id=PAD_ID,
    tie_word_embeddings=False,
)
_DECODER = _COMMON | dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.05,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)

RECIPES = {
    "mixtral": Recipe(
        config=_DECODER | dict(num_local_experts=8, num_experts_per_tok=2),
        one_expert=dict(num_local_experts=1, num_experts_per_tok=1),
        top_k=2,
    ),
    "qwen3_moe": Recipe(
        config=_DECODER
        | dict(
            head_dim=32,
            moe_intermediate_size=128,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
        ),
        one_expert=dict(num_experts=1, num_experts_per_tok=1),
        top_k=4,
        dense_steps=230,
        moe_steps=130,
    ),
    "deepseek_v3": Recipe(
        config=_DECODER
        | dict(
            num_key_value_heads=4,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
        ),
        # Its router sums the two best scores of a group, so it needs two experts to choose one.
        one_expert=dict(n_routed_experts=2, num_experts_per_tok=1),
        top_k=2,
        balance=0.0,
        dense_steps=250,
        moe_steps=130,
    ),
    "switch": Recipe(
        config=_COMMON
        | dict(
            decoder_start_token_id=PAD_ID,
            tie_word_embeddings=True,  # transformers initialises an untied head far too large
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_layers=4,  # as many as the decoder's, whose cache transformers sizes by it
            num_sparse_encoder_layers=2,
            num_decoder_layers=4,
            num_sparse_decoder_layers=2,
            num_experts=4,
            expert_capacity=4096,
            dropout_rate=0.0,
        ),
        one_expert=dict(num_experts=1),
        encoder_decoder=True,
        dense_steps=190,
        moe_steps=150,
        balance=0.05,
        muon_lr=0.0025,  # T5's attention does not scale its scores, so its queries start tiny
    ),
}
_MODEL_TYPES = {"switch": "switch_transformers"}  # if transformers' name differs from the family's

FAMILIES = ("mixtral", "deepseek_v3", "qwen3_moe", "switch")


def build_model(family: str, config: dict[str, Any]) -> PreTrainedModel:
    """A freshly initialised float32 model of the family."""
    made = AutoConfig.for_model(_MODEL_TYPES.get(family, family), **config)
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(made, dtype=torch.float32)
