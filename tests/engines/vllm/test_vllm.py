"""vLLM serves every architecture with mixed widths inside fused layers: its log-probabilities are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm sets up an environment with it")

import tiny_models
import vllm_checkpoints as tiny
from vllm_engine import ask

import kappaquant
from kappaquant.exports.kappaquant_v1 import convert

PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [30, 31, 32, 33, 34, 35, 40, 41, 7, 8], [50, 60]]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    architecture = kappaquant.open_checkpoint(folder).config["model_type"]
    if architecture == "qwen3_5_moe":
        more["limit_mm_per_prompt"] = {"image": 0, "video": 0}  # images would need a processor
    dtype = "bfloat16" if tiny.in_bfloat16(architecture) else "float32"
    return {"model": str(folder), "dtype": dtype, "enforce_eager": True, **more}


def assert_like_transformers(folder: Path, found: dict[str, Any]) -> None:
    """Equal to 1e-4 in float32; in bfloat16 no further from float32 than rounding takes transformers, twice over."""
    tokens = found["tokens"]
    exact = tiny.reference(folder, tokens)
    error = (torch.cat(found["logprobs"]) - exact).abs()
    if not tiny.in_bfloat16(kappaquant.open_checkpoint(folder).config["model_type"]):
        assert error.max() < 1e-4
        return
    rounded = (tiny.reference(folder, tokens, torch.bfloat16) - exact).abs()
    jittered = [(tiny.reference(folder, tokens, jitter=seed) - exact).abs() for seed in range(4)]
    assert error.mean() < 2 * rounded.mean()
    assert error.max() < 2 * max(noise.max() for noise in (rounded, *jittered))


@pytest.mark.parametrize("cards", [1, 2])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logprobs(architecture: str, cards: int, tmp_path: Path) -> None:
    source = tiny.save_source(architecture, tmp_path / "source")
    folders = [tiny.quantize(source, tmp_path / plan, plan) for plan in ("apex2", "random")]
    runs = [
        options(folder, tensor_parallel_size=cards, enforce_eager=eager)
        for folder, eager in zip(folders, (cards == 1, cards == 2), strict=True)
    ]
    for folder, found in zip(folders, ask(tmp_path, PROMPTS, runs), strict=True):
        assert_like_transformers(folder, found)
        assert_resident(folder, found["resident"], cards)


def assert_resident(folder: Path, resident: list[dict[str, int]], cards: int) -> None:
    """What a rank holds of packed weights is its share of their bytes and no more than 10 % besides."""
    checkpoint = kappaquant.open_checkpoint(folder)
    stored = sum(checkpoint.nbytes(name) for name in checkpoint.keys() if checkpoint.format_of(name))
    assert len(resident) == cards
    for rank in resident:
        packed = sum(size for name, size in rank.items() if ".tq_" in name or name.endswith(".codebook"))
        assert stored / cards <= packed <= 1.1 * stored / cards


def test_fused_experts_dealt_out_packed_embeddings_and_float32_norms(tmp_path: Path) -> None:
    moe = tiny.save_source("qwen3_moe", tmp_path / "moe", experts="fused")
    dealt = tiny.quantize(moe, tmp_path / "random", "random", (("*embed_tokens.weight", 8), ("lm_head.weight", 5)))
    tied = tiny.quantize(
        tiny_models.save_tiny("qwen3", tmp_path / "tied", tied=True), tmp_path / "packed", "random", (("*embed*", 6),)
    )
    source = kappaquant.open_source(tiny_models.save_tiny("llama", tmp_path / "llama"))
    plan = kappaquant.make_plan(source.tensors, source.config, "recipe", recipe="apex", group_size=tiny.GROUP)
    legacy = kappaquant.quantize(source, tmp_path / "legacy", plan, kappaquant.Options(container="tq3_native"))
    converted = convert(kappaquant.open_checkpoint(legacy), tmp_path / "converted")
    runs = [
        options(dealt, tensor_parallel_size=2, enable_expert_parallel=True),
        options(tied, tensor_parallel_size=2),
        options(converted, tensor_parallel_size=2),
    ]
    for folder, found in zip((dealt, tied, converted), ask(tmp_path, PROMPTS, runs), strict=True):
        assert_like_transformers(folder, found)
