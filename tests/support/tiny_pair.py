"""A tiny model with a text and its quantized checkpoint, and the one measured against the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import VOCABULARY, character_tokenizer, save_tiny

import kappaquant
from kappaquant.evaluate.documents.evaluation import Evaluation
from kappaquant.evaluate.runs.against import Options, evaluate_against
from kappaquant.evaluate.runs.pair import open_pair

TEXT = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(300))
EXACT = Options(window=40, dtype="float32", top_k=VOCABULARY, activations="float32")


def save_source(folder: Path) -> Path:
    """The original: a model with experts, its tokenizer and the text it is measured on."""
    save_tiny("qwen3_moe", folder)
    character_tokenizer().save_pretrained(folder)
    (folder / "evaluation.txt").write_text(TEXT, encoding="utf-8")
    return folder


def quantized(source: Path, output: Path, bits: int = 3) -> Path:
    opened = kappaquant.open_source(source)
    return kappaquant.quantize(
        opened, output, kappaquant.make_plan(opened.tensors, opened.config, "uniform", bits=bits)
    )


def measure(checkpoint: Path, source: Path, logits: Path, options: Options = EXACT, **more: Any) -> Evaluation:
    return evaluate_against(open_pair(checkpoint, source), source / "evaluation.txt", logits, options, **more)
