"""Measure a checkpoint of the reference model on text it has never seen.

python -m reference.evaluate [--model reference/model] [--problems 300]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reference.text import Problem, extract_answer, problems, scenes

MODEL = Path(__file__).parent / "model"
#: Worked answers stay under 60 tokens; one that runs longer has gone astray.
MAX_NEW_TOKENS = 72


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, asked: Sequence[Problem], batch_size: int = 100) -> list[str]:
    """Greedy completions of the problems' prompts, in order."""
    out = [""] * len(asked)
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
    for start in range(0, len(asked), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer([asked[i].prompt for i in chosen], padding=True, padding_side="left", return_tensors="pt")
        ids = batch["input_ids"].to(model.device)
        mask = batch["attention_mask"].to(model.device)
        made = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            out[i] = text
    return out


def exact_match(model: Any, tokenizer: Any, asked: Sequence[Problem], batch_size: int = 100) -> int:
    """How many of the problems the model answers with exactly the right number."""
    made = answers(model, tokenizer, asked, batch_size)
    return sum(extract_answer(text) == problem.answer for text, problem in zip(made, asked, strict=True))


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 50) -> float:
    """Perplexity per token over texts, each read on its own from its first token."""
    loss, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), padding=True, padding_side="right", return_tensors="pt"
        )
        ids = batch["input_ids"].to(model.device)
        mask = batch["attention_mask"].to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return math.exp(loss / count)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of hits."""
    share = hits / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def measure(model: Any, tokenizer: Any, n_problems: int, n_scenes: int, seed: int) -> dict[str, Any]:
    """Exact match with its interval and perplexities on held-out problems and prose."""
    asked = problems(seed, n_problems)
    hits = exact_match(model, tokenizer, asked)
    return {
        "problems": n_problems,
        "correct": hits,
        "exact_match": round(hits / n_problems, 4),
        "wilson_95": [round(bound, 4) for bound in wilson(hits, n_problems)],
        "perplexity_prose": round(perplexity(model, tokenizer, scenes(seed, n_scenes)), 4),
        "perplexity_worked_problems": round(perplexity(model, tokenizer, [p.prompt + p.worked for p in asked]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.9, help="exit 1 below this exact match")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(device).eval()
    result = measure(model, AutoTokenizer.from_pretrained(args.model), args.problems, args.scenes, args.seed)
    print(json.dumps(result, indent=2))
    if result["exact_match"] < args.at_least:
        raise SystemExit(f"exact match {result['exact_match']} is below the bar of {args.at_least}")


if __name__ == "__main__":
    main()
