"""Tiny models for exports to MLX, with gains, rope and biases that a mistake would show in; and both sides' logits."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import VOCABULARY, character_tokenizer, tiny_model

import kappaquant
from kappaquant.exports.mlx import Options, export_mlx
from kappaquant.formats import affine
from kappaquant.models.skeleton import load_config, model_class

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

CASES = [
    ("llama", "split", False),
    ("llama", "split", True),
    ("mistral", "split", False),
    ("mixtral", "split", False),
    ("mixtral", "fused", False),
    ("qwen3", "split", True),
    ("qwen3_moe", "split", False),
    ("qwen3_moe", "fused", False),
    ("qwen3_5", "split", True),
    ("qwen3_5_moe_text", "split", False),
    ("qwen3_5_moe", "fused", False),
    ("gemma3", "split", True),
    ("gemma3_multimodal", "split", True),
]
THETA = 5000.0  # no architecture's default
KEEP = [("*", 16)]
MIXED = [
    ("*embed_tokens.weight", 6),
    ("*o_proj.weight", 4),
    ("*k_proj.weight", 5),
    ("*in_proj_z.weight", 2),
    ("*down_proj.weight", 8),
    ("*experts.down_proj", 8),
    ("*.w2.weight", 8),
]


def configure(architecture: str, tied: bool, **changes: Any) -> Any:
    """The configuration of ``tiny_models``, as MLX can hold it, with other values than the defaults."""
    config = tiny_model(architecture.removesuffix("_multimodal"), tied=tied).config
    text = config.get_text_config()
    if architecture == "qwen3":
        text.attention_bias = False
    if architecture == "llama":
        text.attention_bias = text.mlp_bias = True
        text.rope_parameters |= {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }  # fmt: skip
    if architecture.startswith("gemma3"):
        text.layer_types = ["sliding_attention", "full_attention"]
        text.hidden_size = 256  # its root, by which embeddings are multiplied, is exact in bfloat16
        text.rope_parameters["full_attention"]["rope_theta"] = THETA
        text.rope_parameters["sliding_attention"]["rope_theta"] = THETA / 2
    else:
        text.rope_parameters["rope_theta"] = THETA
    for name, value in changes.items():
        setattr(text, name, value)
    if architecture == "gemma3_multimodal":
        vision = {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        }  # fmt: skip
        return transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=90
        )
    return config


def save(
    architecture: str,
    folder: Path,
    *,
    experts: str = "split",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A source folder; gains, biases and the like are no constants."""
    config = configure(architecture, tied, **changes)
    torch.manual_seed(0)
    multimodal = architecture == "gemma3_multimodal"
    cls = transformers.Gemma3ForConditionalGeneration if multimodal else model_class(config)
    model: Any = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if "norm" in name else 0.1)
    model.to(dtype).save_pretrained(folder)
    if experts == "fused":
        state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    if tokenizer:
        character_tokenizer().save_pretrained(folder)
    return folder


def export(source: Path, output: Path, overrides: list[tuple[str, int]], **options: Any) -> dict[str, Any]:
    """Three bits apart from those of the overrides that match anything."""
    opened = kappaquant.open_source(source)
    overrides = [(pattern, bits) for pattern, bits in overrides if fnmatch.filter(opened.tensors, pattern)]
    plan = kappaquant.make_plan(opened.tensors, opened.config, "uniform", bits=3, overrides=overrides)
    return export_mlx(opened, output, plan, Options(**{"jobs": 1, **options}))


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 8, (2, 24), generator=torch.Generator().manual_seed(3))


def original(folder: Path) -> Any:
    """transformers' model in float32."""
    return model_class(load_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=tokens()).logits.numpy()


def mlx_logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(tokens().numpy())).astype(mx.float32))


def stored(folder: Path) -> dict[str, mx.array]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in mx.load(str(path)).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def dequantized(folder: Path, kept: Path) -> Any:
    """The model of ``kept``, an export without quantization, with the weights that those of ``folder`` decode to."""
    model = mlx_lm.load(str(kept))[0]
    arrays, formats = stored(folder), config_of(folder)["quantization"]
    decoded = []
    for path, fmt in formats.items():
        if isinstance(fmt, dict):
            packed, scales, biases = (
                torch.from_numpy(np.array(arrays[f"{path}.{part}"])) for part in ("weight", "scales", "biases")
            )
            weight = affine.dequantize(packed.view(torch.uint8), scales, biases, fmt["bits"], fmt["group_size"])
            decoded.append((f"{path}.weight", mx.array(weight.numpy())))
    model.load_weights(decoded, strict=False)
    return model
