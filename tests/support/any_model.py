"""A small random model of any causal architecture that the installed transformers has, made from its default configuration."""

from __future__ import annotations

import signal
from typing import Any

import torch
import transformers
from tiny_models import VOCABULARY
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_LARGEST = 1 << 24  # weights
_SECONDS = 10  # to build one: those with towers whose sizes have other names would take minutes
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# by the names that configurations have for one thing
_SIZES = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (128, "hidden_size d_model n_embd dim embedding_size attention_hidden_size lru_width"),
    (128, "intermediate_size d_ff ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size"),
    (128, "moe_shared_expert_intermediate_size decoder_ffn_dim encoder_ffn_dim max_position_embeddings n_positions"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_d_conv"),
    (2, "num_experts_per_tok moe_k linear_num_key_heads index_n_heads expand"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace n_groups mamba_n_groups n_shared_experts max_window_layers"),
    (32, "head_dim kv_lora_rank q_lora_rank v_head_dim qk_head_dim mamba_d_head mamba_head_dim index_head_dim"),
    (32, "linear_key_head_dim linear_value_head_dim query_pre_attn_scalar"),
    (16, "qk_rope_head_dim qk_nope_head_dim state_size mamba_d_state ssm_state_size chunk_size mamba_chunk_size"),
    (16, "hidden_size_per_layer_input"),
    (8, "sliding_window attention_window_size index_topk mamba_n_heads mamba_num_heads laurel_rank"),
    (0, "num_kv_shared_layers"),
)  # fmt: skip
_SMALL = {name: size for size, names in _SIZES for name in names.split()} | _TOKENS
_OWN: dict[str, dict[str, Any]] = {"mamba2": {"num_heads": 8, "head_dim": 32}}  # expand * hidden_size together
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")


def small_config(model_type: str, **more: Any) -> Any:
    """Its default configuration, with small sizes and a layer of each type."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    known = {*default.to_dict(), *default.attribute_map}
    fields = {name: size for name, size in _SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # keys and values are made for every head
        fields |= {"num_key_value_heads": 4}
        fields.pop("head_dim", None)
    for name in _KINDS:
        own, types = getattr(kind, name, None), getattr(default, name, None)
        if types and not (isinstance(own, property) and own.fset is None):
            once = list(dict.fromkeys(types))
            fields[name] = once if len(once) > 1 else once * 2
            fields["num_hidden_layers"] = len(fields[name])
    return kind(**{**fields, **_OWN.get(model_type, {}), **more})


def small_model(model_type: str, **more: Any) -> Any:
    """A random model in float32, in evaluation mode, whose logits tell errors apart.

    Raises whatever transformers does where small sizes of these names do not make a model.
    """
    kind = getattr(transformers, CAUSAL[model_type])  # imports it, however long that takes
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(_SECONDS)
    try:
        config = small_config(model_type, **more)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > _LARGEST:
            raise ValueError(f"{model_type}: {size:,} weights")
        torch.manual_seed(0)
        model = kind(config).eval()
    finally:
        signal.alarm(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"not built in {_SECONDS} s")
