"""mlx_lm's models from a Hugging Face config.json, and what a checkpoint's tensors are called in them."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.nn as nn

from kappaquant.errors import FormatError, UnsupportedError

logger = logging.getLogger("kappaquant")

_SILU = ("silu", "swish")
_GELU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Architecture:
    """How one model_type meets mlx_lm.

    Attributes:
        module: of ``mlx_lm.models``.
        nested: its parameters lie under ``language_model.``.
        block: what the feed-forward block of a layer is called.
        activations: those that mlx_lm's code computes, whatever config.json says.
        scaled_rope: it reads more of the rotary embedding than its base.
    """

    module: str
    nested: bool = False
    block: str = "mlp"
    activations: tuple[str, ...] = _SILU
    scaled_rope: bool = True


ARCHITECTURES = {
    "gemma3": Architecture("gemma3", nested=True, activations=_GELU),
    "gemma3_text": Architecture("gemma3_text", activations=_GELU),
    "llama": Architecture("llama"),
    "mistral": Architecture("llama"),
    "mixtral": Architecture("mixtral", block="block_sparse_moe", scaled_rope=False),
    "qwen3": Architecture("qwen3"),
    "qwen3_5": Architecture("qwen3_5", nested=True),
    "qwen3_5_moe": Architecture("qwen3_5_moe", nested=True),
    "qwen3_5_moe_text": Architecture("qwen3_5_moe", nested=True),
    "qwen3_5_text": Architecture("qwen3_5", nested=True),
    "qwen3_moe": Architecture("qwen3_moe", scaled_rope=False),
}

# what the language model of a checkpoint has no use for; mlx_lm leaves it behind too
_OTHER_PARTS = re.compile(r"(model\.)?(mtp|visual|vision_tower|multi_modal_projector)\.|.*\.rotary_emb\.inv_freq$")
_EXPERT = re.compile(
    r"(?P<block>.+)\.experts\.((?P<expert>\d+)\.)?"
    r"(?P<matrix>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)(\.weight)?$"
)
_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "w1": ("gate_proj",), "w2": ("down_proj",), "w3": ("up_proj",)}


@dataclass(frozen=True)
class Name:
    """Where a checkpoint tensor goes: parameters stacked along its rows, or one expert's matrix of such."""

    targets: tuple[str, ...]
    of_experts: bool = False
    expert: int | None = None


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Raises UnsupportedError for a model_type that has not been tried."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r}; quantized checkpoints run in mlx_lm for {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[str(model_type)]


def name_in_mlx(name: str, architecture: Architecture, tied: bool) -> Name | None:
    """Where a tensor of the checkpoint belongs; None if the language model has no use for it."""
    if _OTHER_PARTS.match(name) or (tied and name.endswith("lm_head.weight")):
        return None
    if architecture.nested:
        name = re.sub(r"^(model\.language_model|language_model\.model|model)\.", "language_model.model.", name)
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    if architecture.block != "mlp":
        name = re.sub(r"(\.layers\.\d+)\.mlp\.", rf"\1.{architecture.block}.", name)
    found = _EXPERT.match(name)
    if not found:
        return Name((name,))
    matrices = _MATRICES.get(found["matrix"], (found["matrix"],))
    expert = None if found["expert"] is None else int(found["expert"])
    return Name(tuple(f"{found['block']}.switch_mlp.{m}.weight" for m in matrices), True, expert)


def build(config: Mapping[str, Any], label: str) -> nn.Module:
    """mlx_lm's model for a config.json, its parameters not yet evaluated.

    Raises:
        FormatError: mlx_lm cannot read the configuration.
        UnsupportedError: it asks for what mlx_lm's code does not compute.
    """
    architecture = architecture_of(config)
    adapted = adapt(config, label)
    module = import_module(f"mlx_lm.models.{architecture.module}")
    try:
        model = module.Model(module.ModelArgs.from_dict(adapted))
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise FormatError(f"{label}/config.json: mlx_lm cannot build a model from it ({problem})") from problem
    if is_tied(config) and architecture.module.startswith("gemma3"):
        getattr(model, "language_model", model).sanitize({})  # this ties its head when it is shown none
    return model


def adapt(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """config.json in the words that mlx_lm's models read; transformers 5 says some of it otherwise.

    mlx_lm takes its own default for what it does not find, in silence: all that decides a result is therefore spelled out.
    """
    architecture = architecture_of(config)
    adapted: dict[str, Any] = copy.deepcopy(dict(config))
    text = adapted.get("text_config") or adapted
    adapted["model_type"] = architecture.module
    text["tie_word_embeddings"] = is_tied(config)
    for key, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if key in text:
            text.setdefault(other, text[key])
    activation = text.get("hidden_act") or text.get("hidden_activation") or architecture.activations[0]
    if activation not in architecture.activations:
        raise UnsupportedError(
            f"{label}/config.json: activation {activation!r}; mlx_lm's {architecture.module} computes "
            f"{architecture.activations[0]}"
        )
    for key in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "use_sliding_window",
    ):
        if text.get(key):
            raise UnsupportedError(f"{label}/config.json: {key} {text[key]!r}; mlx_lm's {architecture.module} has none")
    if architecture.module.startswith("gemma3"):
        _adapt_gemma3(adapted, text, label)
    elif architecture.module.startswith("qwen3_5"):
        if "layer_types" in text:
            text["full_attention_interval"] = _interval(text["layer_types"], label)
    else:
        _adapt_rope(text, architecture, label)
        window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
        if window and window < text.get("max_position_embeddings", 0):
            logger.warning(
                "%s: mlx_lm attends to everything, the model to %d tokens back; longer prompts will differ",
                label,
                window,
            )
    return adapted


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding; transformers' default where config.json is silent."""
    for part in (config, config.get("text_config") or {}):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return str(config.get("model_type", "")).startswith("gemma3")


def _adapt_rope(text: dict[str, Any], architecture: Architecture, label: str) -> None:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        if not architecture.scaled_rope:
            raise UnsupportedError(f"{label}/config.json: rope_type {kind!r}; mlx_lm's {architecture.module} has none")
        text.setdefault("rope_scaling", rope)


def _adapt_gemma3(adapted: dict[str, Any], text: dict[str, Any], label: str) -> None:
    rope = text.get("rope_parameters") or {}
    whole, local = rope.get("full_attention"), rope.get("sliding_attention")
    if whole and local:
        text["rope_theta"], text["rope_local_base_freq"] = whole["rope_theta"], local["rope_theta"]
        if whole.get("rope_type", "default") != "default":
            text["rope_scaling"] = whole
    if "layer_types" in text:
        text["sliding_window_pattern"] = _interval(text["layer_types"], label)
    if "text_config" in adapted and "vocab_size" in text:
        adapted["vocab_size"] = text["vocab_size"]


def _interval(layer_types: list[str], label: str) -> int:
    """n if every n-th layer, and no other, has full attention: all that mlx_lm's models can express."""
    full = [kind == "full_attention" for kind in layer_types]
    interval = full.index(True) + 1 if True in full else 0
    if not interval or any(is_full != ((i + 1) % interval == 0) for i, is_full in enumerate(full)):
        raise UnsupportedError(
            f"{label}/config.json: layer_types {layer_types}; mlx_lm wants full attention in every n-th layer and no other"
        )
    return interval
