"""The reference model inside vLLM on a GPU, with vLLM's default settings: CUDA graphs of every size, compiled layers, chunked prefill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("vllm", reason="vLLM is not installed here; see docs/serving.md")

from vllm_engine import ask
from vllm_gpu import GPUS, options, quantized, right, sampling

import kappaquant
from kappaquant.kernels.cuda import tiles
from kappaquant.models.sharding import bytes_per_card
from reference.evaluate import MODEL, answers
from reference.text import extract_answer, problems

pytestmark = pytest.mark.gpu
two_cards = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
STORIES, REQUESTS, LONGEST = 300, 64, 4000
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    {"pipeline_parallel_size": 2},
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("plan", ["apex2", "uniform 3", "uniform 4", "trellis", "random"])
def test_stories(plan: str, tokenizer: Any, tmp_path: Path) -> None:
    folder, asked = quantized(tmp_path, plan), problems(0, STORIES)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in asked]
    (found,) = ask(tmp_path, prompts, [options(folder)], sampling(tokenizer))
    model, _ = kappaquant.load(folder, device="cuda")
    made = answers(model, tokenizer, asked)
    expected = sum(extract_answer(text) == p.answer for text, p in zip(made, asked, strict=True)) / STORIES
    print(f"{plan}: vLLM {right(asked, found, tokenizer):.4f}, transformers {expected:.4f}")
    assert abs(right(asked, found, tokenizer) - expected) <= 0.01


def test_prompts_of_all_lengths_at_once(tokenizer: Any, tmp_path: Path) -> None:
    """Log-probabilities with graphs differ from eager ones by what bf16 weights' do, in vLLM's own layers."""
    text = tokenizer((MODEL / "evaluation.txt").read_text())["input_ids"]
    lengths = [round(LONGEST ** (at / (REQUESTS - 1))) for at in range(REQUESTS)]
    prompts = [text[7 * at : 7 * at + length] for at, length in enumerate(lengths)]
    assert [len(prompt) for prompt in prompts] == lengths
    runs = [
        options(folder, max_model_len=LONGEST + 96, enforce_eager=eager)
        for folder in (MODEL, quantized(tmp_path, "apex2"), quantized(tmp_path, "random"))
        for eager in (True, False)
    ]
    found = ask(tmp_path, prompts, runs, {"max_tokens": 16, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0})
    moved = {}
    for name, eager, graphs in zip(("bf16", "apex2", "random"), found[::2], found[1::2], strict=True):
        differences = []
        for prompt, a, b in zip(prompts, eager["logprobs"], graphs["logprobs"], strict=True):
            prompt_and_one = len(prompt)  # what is drawn later depends on what was drawn
            assert len(a) == len(b) == len(prompt) + 15
            differences.append((a - b)[:prompt_and_one].abs())
        moved[name] = float(torch.cat(differences).mean()), float(torch.cat(differences).max())
    print(json.dumps(moved))
    for name in ("apex2", "random"):
        assert moved[name][0] < 2 * moved["bf16"][0]


@two_cards
def test_two_cards_share_the_reference_model(tokenizer: Any, tmp_path: Path) -> None:
    """By tensor and expert parallelism: as many right answers, and each card holds what ``inspect --tp 2`` says.

    vLLM 0.32 cannot cut this model into two pipeline stages, in bf16 either: the first would have no attention layer.
    """
    folder, asked = quantized(tmp_path, "apex2", group_size=64), problems(0, STORIES)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in asked]
    found = ask(tmp_path, prompts, [options(folder, **way) for way in WAYS[:3]], sampling(tokenizer))
    shares = [right(asked, each, tokenizer) for each in found]
    print(shares, [[sum(weights(rank).values()) for rank in each["resident"]] for each in found])
    assert max(shares) - min(shares) <= 0.01
    assert min(shares) > 0.95
    check_resident(folder, found)


@two_cards
def test_two_cards_share_a_large_model(tmp_path: Path) -> None:
    """Eight layers of Qwen3.6-35B-A3B's shape, random weights: log-probabilities move as much as bf16's, and each card has its share."""
    from benchmarks.vllm_serving import build

    build(tmp_path, 8, {"apex2"})
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 200000, (length,), generator=draw).tolist() for length in (1, 17, 200, 1000)]
    tried = [("bf16", way) for way in WAYS[:2]] + [("apex2", way) for way in WAYS]
    runs = [options(tmp_path / name, max_model_len=2048, enforce_eager=True, **way) for name, way in tried]
    found = ask(tmp_path, prompts, runs, {"max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0})
    print([[sum(weights(rank).values()) for rank in each["resident"]] for each in found])
    said = [torch.cat([table[:-1] for table in each["logprobs"]]) for each in found]
    bf16, tensor, expert, pipeline = (
        float((other - one).abs().mean() / one.std())
        for one, other in ((said[0], said[1]), *((said[2], other) for other in said[3:]))
    )
    print({"bf16, tensor parallel": bf16, "tensor": tensor, "expert": expert, "pipeline": pipeline})
    assert max(tensor, expert) < 1.5 * bf16  # sums are rounded in another order, and random routers are near ties
    assert pipeline < 0.01
    packed = found[2:]
    check_resident(tmp_path / "apex2", packed)
    whole, stages = (sum(sum(weights(rank).values()) for rank in packed[way]["resident"]) for way in (0, 3))
    assert len(packed[3]["resident"]) == 2
    # vLLM 0.32 makes the embedding on every stage, which the last one never reads
    embedding = kappaquant.open_checkpoint(tmp_path / "apex2").tensors["model.embed_tokens.weight"].nbytes
    assert 0.999 * (whole + embedding) <= stages <= 1.001 * (whole + embedding)


def weights(rank: dict[str, int]) -> dict[str, int]:
    """Of a rank's tensors those that come from the checkpoint."""
    return {name: size for name, size in rank.items() if "cos_sin_cache" not in name}


def check_resident(folder: Path, found: list[dict[str, Any]]) -> None:
    """``found``: as ``WAYS`` are."""
    checkpoint = kappaquant.open_checkpoint(folder)
    for cards, dealt, each in ((1, False, found[0]), (2, False, found[1]), (2, True, found[2])):
        said = bytes_per_card(
            checkpoint.tensors, checkpoint.format_of, checkpoint.config, cards, expert_parallel=dealt,
            tile=(tiles.ROWS, tiles.INPUTS),
        )  # fmt: skip
        held = [sum(weights(rank).values()) for rank in each["resident"]]
        assert len(held) == cards
        assert 0.99 * said <= max(held) <= 1.01 * said
