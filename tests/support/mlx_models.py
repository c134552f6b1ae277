"""Tiny models whose architecture mlx_lm has too, quantized under mixed plans."""

from __future__ import annotations

import dataclasses
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from choices import choice
from safetensors.torch import load_file, save_file
from tiny_models import WITH_EXPERTS, Experts, tiny_model

import kappaquant
from kappaquant.planning.plan import KEPT

MIXED = {
    "*.q_proj.weight": 4,
    "*.v_proj.weight": 8,
    "*.o_proj.weight": 16,
    "*in_proj_z.weight": 2,
    "*down_proj*": 5,
    "*.w2.weight": 5,
    "*experts.1.up_proj.weight": 6,
    "*experts.2.gate_proj.weight": 16,
    "*experts.3.w3.weight": 7,
}
TRELLIS = {
    "*.q_proj.weight": "t4g32",
    "*.v_proj.weight": "t2g128",
    "*.o_proj.weight": "t3g256",
    "*gate_proj.weight": "t3g64",
    "*experts.1.up_proj.weight": "t2g64",
    "*experts.2.gate_proj.weight": 16,
    "*experts.gate_up_proj": "t3g64",
    "*down_proj*": "t4g64",
}
LAYOUTS = [
    *((a, "split") for a in ("llama", "mistral", "qwen3", "gemma3", "qwen3_5")),
    *((a, e) for a in WITH_EXPERTS for e in ("split", "fused")),
]


def _model(architecture: str, tied: bool) -> Any:
    if architecture not in ("gemma3", "gemma3_multimodal", "qwen3"):
        return tiny_model(architecture, tied=tied)
    model = tiny_model(architecture.partition("_")[0], tied=tied)
    config = model.config
    config.attention_bias = False
    if architecture == "qwen3":
        return type(model)(config).eval()
    config.layer_types = ["sliding_attention", "full_attention"]
    if architecture == "gemma3":
        return type(model)(config).eval()
    vision = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config.tie_word_embeddings = True
    both = transformers.Gemma3Config(
        text_config=config, vision_config=vision, mm_tokens_per_image=1, image_token_index=90
    )
    return transformers.Gemma3ForConditionalGeneration(both).eval()


def save(
    architecture: str,
    folder: Path,
    *,
    experts: Experts = "split",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """As ``tiny_models.save_tiny``, within what mlx_lm expresses: periodic layer types, no biases in qwen3."""
    model = _model(architecture, tied)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "norm" in name:  # all alike they would hide how they are read
                parameter += 0.2 * torch.randn(parameter.shape)
    model = model.to(dtype)
    model.save_pretrained(folder)
    if experts == "fused":
        state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantize(
    source: Path, output: Path, bits: dict[str, int | str] | None = None, *, every: bool = False, **options: Any
) -> Path:
    """3 bits in groups of 64; patterns of ``bits`` (default MIXED) choose other bits or formats by id, even for what policies keep if ``every``."""
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, policy="uniform", bits=3, group_size=64)
    choices = dict(plan.choices)
    for pattern, chosen in (MIXED if bits is None else bits).items():
        matching = [name for name, made in choices.items() if (every or made.format != KEPT) and fnmatch(name, pattern)]
        choices |= {name: choice(chosen, 64) for name in matching}
    plan = dataclasses.replace(plan, choices=choices)
    kappaquant.quantize(opened, output, plan, kappaquant.Options(effort="fast", jobs=1, **options))
    return output


def edit_shard(folder: Path, edit: Any) -> None:
    shard = next(folder.glob("*.safetensors"))
    state = load_file(shard)
    edit(state)
    save_file(state, shard, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tokenizer_to(folder: Path, chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    from tiny_models import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer
