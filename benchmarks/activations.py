"""What int8 and float16 inputs of the GPU kernels cost: KL divergence on the reference model, beside exact arithmetic.

Each variant is compared with the bf16 original, all else in float32: once with its decoded weights and exact products, once
with each kind of input, every token by the kernels for few tokens, which a prompt would not use. Needs an NVIDIA GPU. The loss
decides the default (kappaquant.kernels.base.ACTIVATIONS).

python -m benchmarks.activations
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import kappaquant
from benchmarks.environment import environment, save
from kappaquant import evaluate
from kappaquant.exports.plain import dequantize
from kappaquant.kernels.base import ACTIVATIONS
from kappaquant.kernels.cuda import sorted_experts, tiled
from scripts.demo import MODEL, HeldOut

PLANS: dict[str, dict[str, Any]] = {
    "uniform 3": {"policy": "uniform", "bits": 3},
    "recipe apex2": {"policy": "recipe", "recipe": "apex2"},
    "uniform 5": {"policy": "uniform", "bits": 5},
}


def measure(folder: Path, name: str, original: Any, sequences: list[list[int]]) -> list[dict[str, Any]]:
    source = kappaquant.open_source(MODEL)
    checkpoint = folder / name.replace(" ", "-")
    kappaquant.quantize(source, checkpoint, kappaquant.make_plan(source.tensors, source.config, **PLANS[name]))
    plain = dequantize(kappaquant.open_checkpoint(checkpoint), checkpoint.with_suffix(".plain"), "F32")
    rows = []
    for inputs in ("exact", *ACTIVATIONS):
        model: Any
        if inputs == "exact":
            model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
            model = model.cuda().eval()
        else:
            model, _ = kappaquant.load(checkpoint, torch.float32, "cuda", inputs)
        few = mock.patch.multiple(tiled, FEW_TOKENS=1 << 30, decodes_first=lambda *_: False)
        unsorted = mock.patch.object(sorted_experts, "refusal", return_value="only kernels for few tokens are measured")
        with few, unsorted:
            found = evaluate.kl_divergence(model, original, sequences)
        rows.append({
            "plan": name, "inputs": inputs, "kld": found.mean, "kld_error": found.mean_error, "kld_p99": found.p99,
            "same_top": found.same_top, "perplexity": found.perplexity.value,
        })  # fmt: skip
    return rows


def main() -> None:
    about = environment("cuda")
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    original: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    original = original.cuda().eval()
    held_out = HeldOut.make(tokenizer, 1, 120)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in PLANS for row in measure(Path(folder), name, original, held_out.sequences)]
    table = Table("plan", "inputs", "KLD", "±", "99 %", "same top", "perplexity")
    for row in rows:
        table.add_row(
            row["plan"], row["inputs"], f"{row['kld']:.6f}", f"{row['kld_error']:.6f}", f"{row['kld_p99']:.5f}",
            f"{row['same_top']:.2%}", f"{row['perplexity']:.4f}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(save("activations", {"environment": about, "default": ACTIVATIONS[0], "rows": rows}))


if __name__ == "__main__":
    main()
