"""Packed checkpoints of tiny models whose layers the native core takes, and what they say with and without it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import TEXT, VOCABULARY, save_tiny

import kappaquant
from kappaquant.runtime.decoding import Decoder
from kappaquant.runtime.fused import native

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe")
PROMPT, STEPS = 6, 20


def save(architecture: str, folder: Path) -> Path:
    if architecture != "qwen2":
        return save_tiny(architecture, folder, dtype=torch.bfloat16)
    torch.manual_seed(0)  # biases, and a window that ends within the text
    config = transformers.Qwen2Config(
        **TEXT | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    )
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def packed_families(work: Path) -> dict[str, Path]:
    """Packed checkpoints of ``FAMILIES`` in a folder: some tensors in 16 bits, experts at 3, others at 4, of which some in trellis codes."""
    made = {}
    for architecture in FAMILIES:
        folder = work / architecture
        folder.mkdir()
        source = kappaquant.open_source(save(architecture, folder / "source"))
        wanted: tuple[tuple[str, int | str], ...] = (
            ("*.experts.*", 3),
            ("*.0.mlp.down_proj.weight", "t4g64"),
            ("*.k_proj.weight", "t3g128"),
            ("*.v_proj.weight", 16),
            ("*.in_proj_a.weight", 16),
            ("*.1.mlp.up_proj.weight", 16),
        )
        overrides = [(glob, bits) for glob, bits in wanted if any(fnmatchcase(name, glob) for name in source.tensors)]
        plan = kappaquant.make_plan(source.tensors, source.config, policy="uniform", bits=4, overrides=overrides)
        kappaquant.quantize(source, folder / "out", plan)
        made[architecture] = folder / "out"
    return made


def load(folder: Path, dtype: torch.dtype = torch.float32, activations: str = "float32") -> Any:
    return kappaquant.load(folder, dtype=dtype, activations=activations)[0]


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), native.NativeLayer)]


def unfused(model: Any) -> Any:
    for layer in layers(model):
        del layer.forward
    return model


def logits(model: Any, batch: int = 1, padded: bool = False) -> torch.Tensor:
    """[1 + STEPS, batch, vocabulary], of a prompt and of tokens after it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (batch, PROMPT + STEPS), generator=generator)
    mask = torch.ones(batch, PROMPT, dtype=torch.int64)
    if padded:
        mask[-1, :2] = 0
    decoder = Decoder(model, batch, 64)
    found = [decoder.prefill(tokens[:, :PROMPT], mask)]
    found += [decoder.step(tokens[:, i]) for i in range(PROMPT, PROMPT + STEPS)]
    return torch.stack(found).float()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
