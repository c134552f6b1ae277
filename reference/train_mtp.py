"""Train the reference model's multi-token-prediction layer; the model itself stays as it is.

python -m reference.train_mtp --steps 900
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reference.evaluate import MODEL
from reference.mtp import LAYER, Predictor, load, measure, predict
from reference.train import make_rows

PEAK_LEARNING_RATE = 4e-3
WARM_UP = 0.04


def train(model: Any, rows: Tensor, steps: int, batch: int, seed: int) -> tuple[Predictor, dict[str, Any]]:
    """The trained layer in fp32 and a record of the run. It learns the model's own distribution of the token after the next.

    Which token that is in the text only one sample tells; the model's logits at the next position tell all of them, and
    they are what a guess is checked against.
    """
    torch.manual_seed(seed)
    predictor = Predictor(model.config)
    for name, weight in predictor.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02 if "fc" not in name else weight.shape[-1] ** -0.5)
    decay = [weight for weight in predictor.parameters() if weight.ndim > 1]
    rest = [weight for weight in predictor.parameters() if weight.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    pad, start, total = model.config.pad_token_id, time.perf_counter(), 0.0
    for step in range(steps):
        done = step / steps
        rate = PEAK_LEARNING_RATE * min(1.0, done / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        ids = rows[chosen].long()
        logits, guessed = predict(model, predictor, ids)
        counts = ids[:, 1:] != pad
        loss = torch.nn.functional.cross_entropy(guessed[counts], logits[counts].softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 20 == 19:
            print(f"step {step + 1}  loss {total / 20:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
            total = 0.0
    record = {
        "steps": steps,
        "tokens": steps * batch * rows.shape[1],
        "train_seconds": round(time.perf_counter() - start, 1),
        "rows_of_256": len(rows),
        "batch_rows": batch,
        "seed": seed,
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return predictor, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=LAYER, help="file for the layer; results.json is written beside it")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 tokens a step")
    parser.add_argument("--jobs", type=int, default=3, help="training text: jobs of 5,000 problems and 2,400 scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = make_rows(MODEL, 5000 + args.seed, args.jobs)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    predictor, record = train(model, rows, args.steps, args.batch, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in predictor.tensors().items()}
    save_file(rounded, args.out, metadata={"format": "pt"})
    report = {"training": record, "held_out": measure(*load(args.out), AutoTokenizer.from_pretrained(MODEL))}
    args.out.with_name("results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
