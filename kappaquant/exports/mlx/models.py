"""What MLX's model classes expect: names, config.json, how norms are stored; and what a class cannot hold, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kappaquant.errors import UnsupportedError


@dataclass(frozen=True)
class MlxModel:
    """One model class of mlx_lm.

    Attributes:
        model_type: its name there, which config.json must give.
        architecture: the class that transformers has for the exported text model.
        gain: "weight" or "1 + weight": what a norm of the source multiplies by.
        stored_gain: the same for MLX's own norm.
        prefix: of the decoder's modules; the head stands one step above.
        experts: the module of a sparse layer.
        nested: config.json has the arguments under text_config.
        fixed: why the residual stream cannot be rotated; empty where it can.
    """

    model_type: str
    architecture: str
    gain: str = "weight"
    stored_gain: str = "weight"
    prefix: str = "model."
    experts: str = "mlp"
    nested: bool = False
    fixed: str = ""

    @property
    def head(self) -> str:
        return self.prefix.removesuffix("model.") + "lm_head"


def _qwen3_5(model_type: str, architecture: str) -> MlxModel:
    return MlxModel(model_type, architecture, gain="1 + weight", prefix="language_model.model.", nested=True)


_SANDWICH = (
    "its norms after attention and MLP scale each channel before the sum with the residual stream, and a rotation does not "
    "commute with that"
)
# text model_type of the source -> MLX
MODELS = {
    "gemma3_text": MlxModel(
        "gemma3_text", "Gemma3ForCausalLM", gain="1 + weight", stored_gain="1 + weight", fixed=_SANDWICH
    ),
    "llama": MlxModel("llama", "LlamaForCausalLM"),
    "mistral": MlxModel("mistral", "MistralForCausalLM"),
    "mixtral": MlxModel("mixtral", "MixtralForCausalLM", experts="block_sparse_moe"),
    "qwen3": MlxModel("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": MlxModel("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_5_text": _qwen3_5("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe_text": _qwen3_5("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
}
_ROPE_IN_MLX = {
    "gemma3_text": ("default", "linear", "llama3", "yarn"),
    "mixtral": ("default",),  # its class and that of qwen3_moe read rope_theta alone
    "qwen3_moe": ("default",),
}
_ROPE = ("default", "linear", "llama3", "yarn", "longrope")
_ACTIVATION = {"gemma3_text": "gelu_pytorch_tanh"}


def mlx_model(text: Any) -> MlxModel:
    """MLX's class for a text configuration of transformers.

    Raises:
        UnsupportedError: there is none, or it lacks something that this model uses.
    """
    found = MODELS.get(text.model_type)
    if found is None:
        raise UnsupportedError(
            f"config.json: no export of model_type {text.model_type!r} to MLX; there is one of {', '.join(sorted(MODELS))}"
        )
    for problem in _lacking(text, text.to_dict()):
        raise UnsupportedError(f"config.json: {problem}; mlx_lm's class {found.model_type} has no such option")
    return found


def _lacking(text: Any, values: Mapping[str, Any]) -> list[str]:
    """What the model uses and MLX's class has not."""
    kind, problems = text.model_type, []
    activation = values.get("hidden_act") or values.get("hidden_activation")
    if activation != _ACTIVATION.get(kind, "silu"):
        problems.append(f"activation {activation!r}")
    if kind in ("qwen3", "qwen3_moe", "gemma3_text", "mixtral", "mistral") and values.get("attention_bias"):
        problems.append("attention_bias")
    head = values.get("head_dim")
    if kind == "mixtral" and head not in (None, text.hidden_size // text.num_attention_heads):
        problems.append(f"head_dim {head} beside {text.num_attention_heads} heads of {text.hidden_size} channels")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if values.get(name):
            problems.append(f"{name} {values[name]!r}")
    ropes = values.get("rope_parameters") or {}
    for rope in ropes.values() if kind == "gemma3_text" else [ropes]:
        rope_type = (rope or {}).get("rope_type", "default")
        if rope_type not in _ROPE_IN_MLX.get(kind, _ROPE):
            problems.append(f"rope_type {rope_type!r}")
    if kind == "gemma3_text" and ropes["sliding_attention"].get("rope_type", "default") != "default":
        problems.append("a rope of sliding attention that is scaled")
    if kind in ("qwen3", "qwen3_moe") and "sliding_attention" in (values.get("layer_types") or ()):
        problems.append("layers of sliding attention")
    if kind.startswith("qwen3_5") or kind == "gemma3_text":
        full = [i + 1 for i, t in enumerate(text.layer_types) if t == "full_attention"]
        expected = list(range(full[0], len(text.layer_types) + 1, full[0])) if full else []
        if full != expected or not full:
            problems.append(f"full attention in layers {full} of {len(text.layer_types)}, which is no fixed interval")
    return problems


def notes(text: Any) -> list[str]:
    """Where MLX's class computes something else than transformers', in words."""
    window = getattr(text, "sliding_window", None)
    if text.model_type in ("mistral", "mixtral") and window:
        return [f"mlx_lm attends to all tokens, this model to the last {window}: texts beyond that may differ"]
    return []


def config_json(
    text: Any, source: Mapping[str, Any], tied: bool, dtype: str, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of an export: every argument written out, for MLX's defaults are not those of transformers.

    Args:
        text: transformers' text configuration.
        source: the source's config.json, of which generation settings at the top are kept.
        quantization: MLX's table of formats by module path; empty if nothing is quantized.
    """
    found = MODELS[text.model_type]
    arguments = {key: value for key, value in text.to_dict().items() if key not in _LEFT_OUT and value is not None}
    arguments |= {name: getattr(text, name) for name in text.attribute_map}  # MLX knows the older names
    arguments |= {"tie_word_embeddings": tied, "dtype": dtype} | _rope(text, arguments) | _periods(text)
    head: dict[str, Any] = {"architectures": [found.architecture], "model_type": found.model_type}
    if found.nested:
        tokens = {k: v for part in (arguments, source) for k, v in part.items() if k in _TOKENS and v is not None}
        config = {**head, **tokens, "tie_word_embeddings": tied, "dtype": dtype, "text_config": arguments}
    else:
        config = {**arguments, **head}
    if quantization:
        config |= {"quantization": dict(quantization), "quantization_config": dict(quantization)}
    return config


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LEFT_OUT = (
    "architectures",
    "quantization_config",
    "transformers_version",
    "_name_or_path",
    "output_hidden_states",
    "return_dict",
)


def _rope(text: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """MLX reads rope_theta and rope_scaling, which transformers keeps in rope_parameters now."""
    ropes = arguments.get("rope_parameters") or {}
    if text.model_type == "gemma3_text":
        full, sliding = ropes["full_attention"], ropes["sliding_attention"]
        scaled = {"rope_scaling": full} if full.get("rope_type", "default") != "default" else {}
        return {"rope_theta": full["rope_theta"], "rope_local_base_freq": sliding["rope_theta"]} | scaled
    if text.model_type.startswith("qwen3_5"):
        return {}  # reads rope_parameters
    scaled = {"rope_scaling": ropes} if ropes.get("rope_type", "default") != "default" else {}
    return {"rope_theta": ropes["rope_theta"]} | scaled


def _periods(text: Any) -> dict[str, Any]:
    """MLX finds the layers of full attention by their interval."""
    if text.model_type == "gemma3_text":
        return {"sliding_window_pattern": text.layer_types.index("full_attention") + 1}
    if text.model_type.startswith("qwen3_5"):
        return {"full_attention_interval": text.layer_types.index("full_attention") + 1}
    return {}
