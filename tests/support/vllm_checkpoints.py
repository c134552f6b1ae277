"""Tiny quantized checkpoints as vLLM's CPU kernels take them, and what transformers says of their dequantized weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant.models.skeleton import load_config, model_class

ARCHITECTURES = ("llama", "qwen3", "mixtral", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe")
GATE_UP = ("gate_proj", "up_proj")
GROUP = 32  # so that two cards share tiny matrices in whole groups
RANDOM = (2, 3, 4, 5, 6, 7, 8, 16, *(f"t{bits}g{GROUP}" for bits in (2, 3, 4)))


def in_bfloat16(architecture: str) -> bool:
    """vLLM's CPU kernels run GatedDeltaNet in bfloat16 only."""
    return architecture.startswith("qwen3_5")


def save_source(architecture: str, folder: Path, experts: tiny_models.Experts = "split") -> Path:
    if not in_bfloat16(architecture):
        return tiny_models.save_tiny(architecture, folder, experts=experts)
    config = tiny_models._config(architecture, tied=False)
    text = config.get_text_config()
    text.linear_key_head_dim = text.linear_value_head_dim = 64  # the least that vLLM's CPU kernels take
    text.num_experts_per_tok = text.num_experts  # routing would turn rounding errors into other experts
    torch.manual_seed(0)
    model = getattr(transformers, tiny_models._CLASSES[architecture])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def as_multimodal(text: Path, folder: Path) -> Path:
    """A text model and its MTP head in the class and the names of the published ones: a vision tower, experts one by one."""
    config = json.loads((text / "config.json").read_text())
    config["rope_parameters"] |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    vision = {**tiny_models._VISION, "out_hidden_size": config["hidden_size"]}
    whole = transformers.Qwen3_5MoeConfig(**{**tiny_models._MULTIMODAL, "vision_config": vision}, text_config=config)
    whole.tie_word_embeddings = False
    model = transformers.Qwen3_5MoeForConditionalGeneration(whole).to(torch.bfloat16)
    content = {name: t for name, t in model.state_dict().items() if ".visual." in name}
    for name, tensor in load_file(text / "model.safetensors").items():
        name = name.replace("model.", "model.language_model.")
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            content[name] = tensor
            continue
        layer, _, projection = name.rpartition(".")
        for expert, matrix in enumerate(tensor):
            parts = (
                {"down_proj": matrix} if projection == "down_proj" else dict(zip(GATE_UP, matrix.chunk(2), strict=True))
            )
            content |= {f"{layer}.{expert}.{part}.weight": rows.clone() for part, rows in parts.items()}
    whole.architectures = ["Qwen3_5MoeForConditionalGeneration"]
    whole.save_pretrained(folder)
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantize(source: Path, output: Path, plan: str, overrides: tuple[tuple[str, int | str], ...] = ()) -> Path:
    """By recipe, or with ``plan="random"`` any format for any tensor that the planner quantizes."""
    opened = kappaquant.open_source(source)
    made = kappaquant.make_plan(opened.tensors, opened.config, "recipe", recipe="apex2", group_size=GROUP)
    if plan == "random":
        draw = random.Random(output.name)
        chosen = [(name, draw.choice(RANDOM)) for name, choice in made.choices.items() if "apex2" in choice.why]
        overrides = (*chosen, *overrides)
    made = kappaquant.make_plan(
        opened.tensors, opened.config, "recipe", recipe="apex2", group_size=GROUP, overrides=overrides
    )
    kappaquant.quantize(opened, output, made)
    return output


def reference(
    folder: Path, tokens: list[list[int]], dtype: torch.dtype = torch.float32, jitter: int | None = None
) -> torch.Tensor:
    """Log-probabilities [positions of all sequences, vocabulary], each sequence without its last token, by transformers.

    With ``jitter``, a seed, every weight moves by up to half a step of bfloat16: how much a rounding error can grow to.
    """
    checkpoint = kappaquant.open_checkpoint(folder)
    config: Any = load_config(folder)
    del config.quantization_config
    stored = torch.bfloat16 if in_bfloat16(config.model_type) else torch.float32
    state = {name: checkpoint.dequantize(name).to(stored).to(dtype) for name in checkpoint.keys()}
    if jitter is not None:
        torch.manual_seed(jitter)
        state = {name: t * (1 + (torch.rand_like(t) - 0.5) / 256) for name, t in state.items()}
    model = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
    with torch.no_grad():
        made = [torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].float(), -1) for ids in tokens]
    return torch.cat(made)
