"""Tiny random models of every supported architecture, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

Experts = Literal["split", "fused"]

VOCABULARY = 96
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,  # no multiple of the group: rows are padded
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
_MULTIMODAL: dict[str, Any] = {
    "vision_config": _VISION,
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def _config(architecture: str, tied: bool) -> Any:
    text: dict[str, Any] = {**TEXT, "tie_word_embeddings": tied}
    moe = {**text, **_EXPERTS}
    shared = {**moe, **_HYBRID, "shared_expert_intermediate_size": 128}
    hybrid = {**text, **_HYBRID}
    match architecture:
        case "llama":
            return transformers.LlamaConfig(**text)
        case "mistral":
            return transformers.MistralConfig(**text)
        case "gemma3":
            return transformers.Gemma3TextConfig(**text, sliding_window=8, query_pre_attn_scalar=32)
        case "qwen3":
            return transformers.Qwen3Config(**text, attention_bias=True)
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(**moe, mlp_only_layers=[1])
        case "mixtral":
            return transformers.MixtralConfig(**text, num_local_experts=5, num_experts_per_tok=2)
        case "qwen3_5":
            return transformers.Qwen3_5TextConfig(**hybrid)
        case "qwen3_5_moe_text":
            return transformers.Qwen3_5MoeTextConfig(**shared)
        case "qwen3_5_moe":
            return transformers.Qwen3_5MoeConfig(text_config=shared, **_MULTIMODAL, tie_word_embeddings=tied)
    raise ValueError(architecture)


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
ARCHITECTURES = tuple(_CLASSES)
WITH_EXPERTS = ("qwen3_moe", "mixtral", "qwen3_5_moe_text", "qwen3_5_moe")
LAYOUTS = [(a, e) for a in ARCHITECTURES for e in (("split", "fused") if a in WITH_EXPERTS else ("split",))]


def tiny_model(architecture: str, *, tied: bool = False, seed: int = 0) -> Any:
    """A random model in float32, weights large enough that its logits tell errors apart."""
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES[architecture])(_config(architecture, tied)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def save_tiny(
    architecture: str,
    folder: Path,
    *,
    experts: Experts = "split",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Save a tiny model with one tensor per expert matrix ("split", as save_pretrained does) or one per layer ("fused")."""
    model = tiny_model(architecture, tied=tied, seed=seed).to(dtype)
    model.save_pretrained(folder)
    if experts == "fused":
        tied_names = model.all_tied_weights_keys
        state = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied_names}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def character_tokenizer(bos: str | None = None, adds: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A token for each of VOCABULARY - 1 characters, and one for all others.

    Args:
        bos: which of the characters is the BOS token, if any; adds: its post-processor puts it before every text.
    """
    characters = [chr(32 + i) for i in range(VOCABULARY - 1)]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, "<unk>"])}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if adds:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token=bos)
