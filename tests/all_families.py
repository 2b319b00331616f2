"""Tiny models of every family of transformers that has experts, from its config class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

_EXPERTS = re.compile(
    r"use_experts_implementation|class \w*(Experts?|MoE|MoeBlock|ExpertGLU|SparseMLP)\("
)
_HEADS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)

# Sizes by the name of a config's field, for all families that have it.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "moe_intermediate_size": 12,
    "expert_ffn_hidden_size": 12,
    "shared_expert_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "shared_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    "max_position_embeddings": 64,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 24,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "downsample_hidden_size": 8,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 8,
    "linear_num_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Changes of the table above by family.
_CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": {"num_hidden_layers": 1}},
    "axk2": {"num_key_value_heads": 4},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 12, "moe_top_k": 2},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": {"global_attn_indexes": [0]}},
    },
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"pyramid_num_routed": [-1, 4]},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [12, 8],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
    },
    "deepseek_v32": {"num_key_value_heads": 4},
    "doge": {"is_moe": True},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "text_config": {
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        },
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
            },
        },
    },
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "index_kpool": 2,
            "qk_rope_head_dim": 0,
            "mlp_layer_types": ["dense", "sparse"],
        },
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {"text_config": {"intermediate_size_mlp": 24}},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 24, "zero_expert_num": 2, "head_dim": 4},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
    "muse_spark": {
        "vision_config": {"num_hidden_layers": 1},
        "audio_config": {
            "num_hidden_layers": 1,
            "patch_sizes": [2],
            "hidden_sizes": [8],
            "depths": [1],
        },
    },
    "nllb_moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "decoder_start_token_id": 2,
    },
    "qwen3_omni_moe": {
        "audio_config": {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 12},
    },
    "step3p7": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "sliding_window": 8}},
    "switch_transformers": {
        "d_kv": 8,
        "d_ff": 12,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def family_names() -> list[str]:
    """transformers' folders whose models define experts, found in their sources."""
    models = Path(transformers.__file__).parent / "models"
    sources = sorted(models.glob("*/modeling_*.py"))
    return sorted({path.parent.name for path in sources if _EXPERTS.search(path.read_text())})


def family_config(folder: str) -> PretrainedConfig:
    """The tiny config of a family."""
    config, _ = class_of(folder)
    return tiny_config(getattr(transformers, config), _CHANGES.get(folder, {}))


def tiny_config(kind: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    """A config with small sizes. changes: fields of the config and, by name, of its parts."""
    fields = kind.__dataclass_fields__
    values: dict[str, Any] = {k: v for k, v in _SIZES.items() if k in fields}
    if kind.sub_configs:
        usual = kind()
        for name in kind.sub_configs:
            part = getattr(usual, name, None)
            if isinstance(part, PretrainedConfig) and name in fields:
                values[name] = tiny_config(type(part), changes.get(name, {}))
    return kind(**values | {k: v for k, v in changes.items() if k not in kind.sub_configs})


def tiny_model(folder: str) -> PreTrainedModel:
    """A random float32 model of a family, whose experts run eagerly."""
    _, model = class_of(folder)
    torch.manual_seed(0)
    kind = getattr(transformers, model)
    made = kind._from_config(family_config(folder), experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            is_norm = "norm" in name or parameter.dim() == 1
            parameter.normal_(1.0 if is_norm else 0.0, 0.1 if is_norm else 0.2)
    return made


def class_of(folder: str) -> tuple[str, str]:
    """Names of the config and model class of a family's whole model."""
    for heads in _HEADS:
        for model_type, config in configuration_auto.CONFIG_MAPPING_NAMES.items():
            of_family = configuration_auto.model_type_to_module_name(model_type) == folder
            if of_family and model_type in heads:
                return config, heads[model_type]
    raise LookupError(folder)
