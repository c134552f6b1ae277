"""Headers of tiny models of every known architecture, in memory and as transformers writes them."""

import json
from functools import cache

import torch
from safetensors import safe_open
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kappaquant.files.safetensors import TensorInfo

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 160,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
DENSE = {key: value for key, value in TEXT.items() if not key.startswith(("linear_", "layer_types"))}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
QWEN_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODELS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**DENSE, "attention_bias": True}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**DENSE, **MOE}),
    "qwen3_5_text": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, TEXT),
    "qwen3_5": (Qwen3_5ForConditionalGeneration, Qwen3_5Config, {"text_config": TEXT, "vision_config": QWEN_VISION}),
    "qwen3_5_moe_text": (Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, {**TEXT, **MOE}),
    "qwen3_5_moe": (
        Qwen3_5MoeForConditionalGeneration,
        Qwen3_5MoeConfig,
        {"text_config": {**TEXT, **MOE}, "vision_config": QWEN_VISION},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {**DENSE, "attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, DENSE),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig, DENSE),
    "gemma3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config,
        {"text_config": DENSE, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
}


@cache
def tiny(arch):
    """(model, config.json as a dict) of a tiny random model."""
    model_class, config_class, settings = MODELS[arch]
    config = config_class(**settings)
    config.architectures = [model_class.__name__]
    return model_class(config).to(torch.bfloat16), config.to_dict()


def in_memory(arch):
    model, config = tiny(arch)
    return infos({name: tuple(t.shape) for name, t in model.state_dict().items()}), config


def saved(arch, folder):
    """The tensors that save_pretrained writes: experts one by one, older prefixes, the config that goes with them."""
    tiny(arch)[0].save_pretrained(folder)
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return infos(shapes), json.loads((folder / "config.json").read_text())


def infos(shapes, dtype="BF16"):
    return {name: TensorInfo(name, dtype, tuple(shape)) for name, shape in shapes.items()}
