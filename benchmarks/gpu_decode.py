"""Qwen3.6-35B-A3B's exact shape with random weights on one GPU: decoding and prefill, bf16 against packed.

Weights are made on the card, layer by layer: 70 GB in bf16, and never both. Every variant runs transformers' own model
through the same static cache; a step is timed by events, with the draw of the token, and a row is the median.

python -m benchmarks.gpu_decode [--layers 4] [--only apex2 --only "apex2, trellis" --save gpu_decode_trellis]
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from benchmarks.random_model import packed, plain
from kappaquant.runtime.bench import measure

PREFILL = 2048
CASES = ((1, 32), (8, 32), (1, PREFILL), (1, 4096), (8, 4096))  # (batch, context)
SHORT = CASES[:2]
STEPS = 64

# name -> (what makes the model, cases, graph); neighbours with the same maker share one model
Variants = dict[str, tuple[Callable[[Any, str], Any], tuple[tuple[int, int], ...], bool | None]]
VARIANTS: Variants = {
    "apex2": (partial(packed, policy="recipe", recipe="apex2"), CASES, None),
    "apex2, trellis": (partial(packed, policy="recipe", recipe="apex2", trellis=True), CASES, None),
    "bf16": (plain, CASES, None),
    "bf16, no graph": (plain, SHORT, False),  # bound by launches, at any context
    "uniform 3": (partial(packed, policy="uniform", bits=3), CASES, None),
}


def qwen3_6(layers: int | None = None) -> Any:
    """The configuration of the text model; transformers' defaults are this model."""
    from transformers import Qwen3_5MoeTextConfig

    options: dict[str, Any] = {"num_hidden_layers": layers} if layers else {}
    return Qwen3_5MoeTextConfig(**options)


def rows(config: Any, device: str, variants: Variants, steps: int = STEPS) -> Iterator[dict[str, Any]]:
    """Measure variant by variant, with one model in memory at a time."""
    model: Any = None
    made_by = None
    for name, (make, cases, graph) in variants.items():
        if make is not made_by:
            model = None
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            model, made_by = make(config, device), make
        for row in measure(model, cases, steps=steps, graph=graph):
            yield {"model": name, "weights_gib": round(held_bytes(model) / 2**30, 3), **row.to_json()}


def aims(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What decoding is built to reach, as far as it was measured."""
    at = {(row["model"], row["batch"], row["context"]): row for row in found}
    ours, peer = at.get(("apex2", 1, PREFILL)), at.get(("bf16", 1, PREFILL))
    made: list[tuple[str, float, float]] = []
    if ("apex2", 1, 32) in at:
        made.append(("apex2, batch 1, context 32, decode tok/s", at["apex2", 1, 32]["decode_tokens_per_s"], 250.0))
    if ("apex2, trellis", 1, 32) in at:
        made.append(("apex2 in trellis codes, the same", at["apex2, trellis", 1, 32]["decode_tokens_per_s"], 480.0))
    if ours and peer:
        made.append((f"apex2, prefill of {PREFILL}, tok/s", ours["prefill_tokens_per_s"], peer["prefill_tokens_per_s"]))
    return [
        {"what": what, "reached": value, "aim": f">= {least:g}", "met": value >= least} for what, value, least in made
    ]


def held_bytes(model: Any) -> int:
    """Of parameters and buffers."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="a smaller model, to try; its result is not saved")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="a variant; may be given several times")
    parser.add_argument("--save", default="gpu_decode", help="name of the result of all layers")
    parser.add_argument("--cases", default=",".join(f"{b}x{c}" for b, c in CASES), help="batch x context")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    wanted = {tuple(map(int, case.split("x"))) for case in options.cases.split(",")}
    variants: Variants = {
        name: (make, tuple(case for case in cases if case in wanted), graph)
        for name, (make, cases, graph) in VARIANTS.items()
        if not options.only or name in options.only
    }
    console, about = Console(width=130), environment("cuda")
    table = Table("model", "batch", "context", "decode tok/s", "step ms", "prefill tok/s", "first token ms", "weights GiB",
                  "peak GiB", "kernels/step")  # fmt: skip
    whole = options.layers is None and (not options.only or options.save != "gpu_decode")
    found: list[dict[str, Any]] = []
    for row in rows(qwen3_6(options.layers), "cuda", variants):
        found.append(row)
        shown = ("model", "batch", "context", "decode_tokens_per_s", "step_ms", "prefill_tokens_per_s", "first_token_ms",
                 "weights_gib", "peak_gib", "kernels_per_step")  # fmt: skip
        table.add_row(*(str(row[key]) for key in shown))
        print(*(row[key] for key in shown), file=sys.stderr, flush=True)  # a long run shows where it is
        if whole:
            save(options.save, {"environment": about, "rows": found, "aims": aims(found)})  # and keeps what it has
    console.print(table)
    for aim in aims(found):
        console.print(
            f"{'met   ' if aim['met'] else 'missed'} {aim['what']}: {aim['reached']} ({aim['aim']})", highlight=False
        )


if __name__ == "__main__":
    main()
