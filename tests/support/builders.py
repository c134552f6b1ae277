"""Small source folders for tests that need no model class, only tensors."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kappaquant

CONFIG = {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], "dtype": "bfloat16"}
Q = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One of each kind: 2-D, fused 3-D and per-expert weights, other dtypes, and shapes nothing can quantize."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    return {
        "model.embed_tokens.weight": weight(64, 256),
        Q: weight(96, 256),
        "model.layers.0.self_attn.o_proj.weight": weight(256, 200),  # padded to whole groups
        "model.layers.0.self_attn.k_proj.weight": weight(32, 256, dtype=torch.float16),
        "model.layers.0.self_attn.v_proj.weight": weight(32, 256, dtype=torch.float32),
        EXPERTS: weight(4, 64, 256),
        "model.layers.1.mlp.experts.down_proj": weight(4, 256, 128),
        "model.layers.2.mlp.experts.0.gate_proj.weight": weight(32, 256),
        "model.layers.2.mlp.experts.1.gate_proj.weight": weight(32, 256),
        "model.layers.1.mlp.gate.weight": weight(4, 256),
        "model.layers.0.linear_attn.A_log": weight(8, dtype=torch.float32),
        "model.norm.weight": weight(256),
        "model.scalar": torch.tensor(3.0),
        "model.steps": torch.arange(5),
        "model.layers.3.self_attn.q_proj.weight": torch.zeros(0, 256, dtype=torch.bfloat16),
        "model.layers.3.self_attn.k_proj.weight": torch.zeros(4, 0, dtype=torch.bfloat16),
        "lm_head.weight": weight(64, 256),
    }


def write_source(
    folder: Path, content: dict[str, torch.Tensor] | None = None, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A source folder with these tensors dealt to so many shards, a tokenizer file and a licence."""
    content = tensors() if content is None else content
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "LICENSE").write_text("as you like")
    names = sorted(content)
    if shards == 1:
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        members = {name: content[name] for name in names[number::shards]}
        save_file(members, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(members, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantize(folder: Path, output: Path, policy: str = "uniform", **options: Any) -> kappaquant.Checkpoint:
    source = kappaquant.open_source(folder)
    plan = kappaquant.make_plan(source.tensors, source.config, policy, group_size=128)
    kappaquant.quantize(source, output, plan, kappaquant.Options(**options))
    return kappaquant.open_checkpoint(output)


def refused(folder: Path, kind: type[Exception], message: str) -> None:
    """Quantizing the folder raises, and leaves nothing beside it."""
    output = folder.parent / "out"
    with pytest.raises(kind, match=message):
        quantize(folder, output)
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
