"""Tiny configurations of transformers' architectures: the defaults of each, made small by what their keys mean.

A key is made small wherever it occurs, also in the configuration of a tower. What one architecture wants otherwise stands in
``OWN``; keys that must agree with others (one list entry for each layer, say) are there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 128
HIDDEN = 256
_SMALL: Mapping[str, int] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 384,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "depth": 1, "num_attention_heads": 4, "n_head": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "n_embd": HIDDEN, "n_inner": 512, "ffn_dim": 512, "word_embed_proj_dim": HIDDEN,
    "max_position_embeddings": 256, "sliding_window": 64, "attention_window_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "num_experts_per_tok": 2, "num_experts_per_token": 2, "top_k_experts": 2, "moe_k": 2, "moe_topk": 2, "zero_expert_num": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 128, "expert_ffn_hidden_size": 128,
    "ffn_hidden_size": 384, "shared_expert_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128,
    "intermediate_size_mlp": 384, "moe_latent_size": 128,
    "q_lora_rank": 128, "kv_lora_rank": 128, "o_lora_rank": 128, "o_groups": 2, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 64, "swa_v_head_dim": 64,
    "global_head_dim": 64, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 128,
    "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 32, "lru_width": HIDDEN, "hc_mult": 2,
    "image_size": 28, "patch_size": 14, "out_hidden_size": HIDDEN,
}  # fmt: skip
_FOR_EACH_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _TWO_KINDS,
    "bloom": {"hidden_size": HIDDEN, "n_head": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"head_dim": 128},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {"intermediate_size": [384, 384], "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 64},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128},
    "granitemoe": {"attention_multiplier": 0.125},
    "granitemoe_swa": {"attention_multiplier": 0.125},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 64, "attention_multiplier": 0.125},
    "granitemoeshared": {"attention_multiplier": 0.125},
    "hunyuan_v1_moe": {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _TWO_KINDS,
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 32, "qk_head_dim": 96},
    "minimax": _TWO_KINDS,
    "mistral4": {"head_dim": 32, "qk_nope_head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8192}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4},
    "qwen3_5_moe_text": _TWO_KINDS,
    "qwen3_next": _TWO_KINDS,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 64, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}  # fmt: skip

# what a default lacks, or has so small that nothing of it is a large matrix
SIZE: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 4096, "n_head": 32, "n_layer": 30},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "hunyuan_v1_moe": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
}


def sized(model_type: str) -> Any:
    """transformers' configuration of the size that the architecture has by default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls: Any = CONFIG_MAPPING[model_type]
    own = SIZE.get(model_type, {})
    return cls.from_dict(cls().to_dict() | own) if own else cls()


def tiny(model_type: str) -> Any:
    """transformers' configuration of a tiny model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls: Any = CONFIG_MAPPING[model_type]
    small = _shrunk(cls().to_dict()) | OWN.get(model_type, {})
    for part in (small, small.get("text_config") or {}):
        if part.get("kv_lora_rank"):  # latent attention has as many keys as queries, and tells its width by parts
            part["num_key_value_heads"] = part["num_attention_heads"]
            if "head_dim" not in OWN.get(model_type, {}):
                part.pop("head_dim", None)
    return cls.from_dict(small)


def class_of(model_type: str) -> Any:
    """The class that generates text with a configuration."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for names in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in names:
            name: Any = names[model_type]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise KeyError(model_type)


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key == "per_layer_config":
            continue
        if isinstance(value, dict) and key.endswith("config"):
            small[key] = _shrunk(value)
        elif key in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, _SMALL[key])
        elif key in _FOR_EACH_LAYER and isinstance(value, list):
            small[key] = value[:2]
        elif key.endswith("token_id") and value is not None:
            small[key] = 1 if isinstance(value, list) or value >= VOCABULARY else value
        else:
            small[key] = value
    return small
