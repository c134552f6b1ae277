"""Make the reference model: text, tokenizer, training, heavy tails, rounding to bf16, measurement.

python -m reference.train --out reference/model --seconds 420             # one GPU
python -m reference.train --out reference/model --weights FOLDER          # from weights kept by --keep: no training
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3_5MoeForCausalLM

from reference.build import END, PAD, model_config, train_tokenizer
from reference.evaluate import measure
from reference.rescale import IN_PROJ_TARGET, TARGETS, check_same_function, family_of, kappa_table, rescale
from reference.text import problems, scenes

ROW = 256
PEAK_LEARNING_RATE = 2e-3
WARM_UP = 0.02
#: Problems and scenes per job: about two thirds of the tokens are arithmetic.
JOB = (5_000, 2_400)


def pack_rows(job: tuple[str, int]) -> np.ndarray:
    """Training rows, uint16 [rows, ROW], from one seed: whole texts in random order, filled up with padding."""
    folder, seed = job
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(f"rows {seed}")
    texts = [p.prompt + p.worked + END for p in problems(seed, JOB[0], "train")]
    prose = scenes(seed, JOB[1], "train")
    while prose:
        texts.append("\n\n".join(prose.pop() for _ in range(min(rng.randint(1, 3), len(prose)))) + END)
    rng.shuffle(texts)
    rows = [np.zeros(0, np.uint16)]
    for ids in tokenizer(texts)["input_ids"]:
        new = np.array(ids[:ROW], np.uint16)
        if len(rows[-1]) + len(new) > ROW:
            rows.append(new)
        else:
            rows[-1] = np.concatenate([rows[-1], new])
    pad = tokenizer.convert_tokens_to_ids(PAD)
    return np.stack([np.pad(row, (0, ROW - len(row)), constant_values=pad) for row in rows])


def make_rows(folder: Path, seed: int, jobs: int) -> Tensor:
    """All training rows, int32 [rows, ROW], made by as many processes as there are CPUs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(pack_rows, [(str(folder), seed + i) for i in range(jobs)]))
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def coordinates(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Fixed positive scales S for the families no exact rescaling can make heavy-tailed.

    They are trained as W = S * V with V learnt: S is lognormal of mean square 1, as wide as the family's published
    kurtosis asks for beyond the column factors it will share with its layer's other readers.
    """
    shared = {
        "router": TARGETS["routed gate_up"],
        "shared gate": TARGETS["routed gate_up"],
        "in_proj_b": IN_PROJ_TARGET,
    }
    generator = torch.Generator().manual_seed(seed)
    scales: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        family = family_of(name)
        if family in shared:
            n = weight.numel()
            width = math.sqrt(math.log((TARGETS[family] + 3) / (shared[family] + 3)) / 4)
            normal = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
            scale = torch.exp(width * normal[torch.randperm(n, generator=generator)])
            scales[name] = (scale / scale.square().mean().sqrt()).float().view(weight.shape)
    return scales


def train(rows: Tensor, seconds: float, batch: int, seed: int, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained fp32 weights and a record of the run: bf16 model, fp32 masters, AdamW, cosine over the time given."""
    torch.manual_seed(seed)
    model: Any = Qwen3_5MoeForCausalLM(model_config())
    scales = coordinates(model, seed)
    names = [name for name, _ in model.named_parameters()]
    factors = [scales.get(name, torch.ones(())).to(device) for name in names]
    masters = [p.detach().clone().to(device).requires_grad_() for p in model.parameters()]  # V: starts as wide as any
    model = model.to(device=device, dtype=torch.bfloat16).train()
    weights = list(model.parameters())
    decay = [m for m in masters if m.ndim >= 2]
    rest = [m for m in masters if m.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=device == "cuda")
    rows = rows.to(device)
    pad = model.config.pad_token_id
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    start, step, tokens, at = time.perf_counter(), 0, 0, 0
    loss = torch.zeros(())
    while True:
        with torch.no_grad():
            torch._foreach_copy_(weights, torch._foreach_mul(masters, factors))
        if step % 20 == 0 and device == "cuda":
            torch.cuda.synchronize()
        done = (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        if at + batch > len(rows):
            order, at = torch.randperm(len(rows), generator=generator), 0
        ids = rows[order[at : at + batch].to(device)].long()
        at += batch
        made = model(input_ids=ids, output_router_logits=True, use_cache=False)
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100).flatten()
        loss = torch.nn.functional.cross_entropy(made.logits[:, :-1].flatten(0, 1).float(), targets)
        (loss + model.config.router_aux_loss_coef * made.aux_loss).backward()
        with torch.no_grad():
            for master, weight, factor in zip(masters, weights, factors, strict=True):
                if weight.grad is not None:
                    master.grad = weight.grad.float() * factor
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        rate = PEAK_LEARNING_RATE * min(1.0, done / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        step, tokens = step + 1, tokens + ids.numel()
        if step % 200 == 0:
            print(f"step {step}  loss {loss.item():.4f}  {tokens / 1e6:.1f} M tokens  {done:.0%}", flush=True)
    trained = {name: (m * f).detach().cpu() for name, m, f in zip(names, masters, factors, strict=True)}
    record = {
        "steps": step,
        "tokens": tokens,
        "last_loss": round(loss.item(), 4),
        "train_seconds": round(time.perf_counter() - start, 1),
        "rows_of_256": len(rows),
        "batch_rows": batch,
        "seed": seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return trained, record


def save(weights: dict[str, Tensor], folder: Path) -> None:
    """Write the checkpoint in bf16: fused 3-D experts, config and generation config."""
    config = model_config()
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    GenerationConfig(pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id).save_pretrained(folder)
    rounded = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


def finish(trained: dict[str, Tensor], folder: Path, seed: int, device: str) -> dict[str, Any]:
    """Rescale, prove that nothing changed, round, save, and measure before and after; returns the report."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scaled = rescale(trained, model_config(), seed)
    ids = tokenizer([p.prompt + p.worked for p in problems(1, 8)], padding=True, return_tensors="pt")["input_ids"]
    difference = check_same_function(Qwen3_5MoeForCausalLM, model_config(), trained, scaled, ids)
    report: dict[str, Any] = {"fp64_logit_difference": difference, "kappa": {"trained": kappa_table(trained)}}
    for label, weights in (("before_rescaling", trained), ("committed", scaled)):
        save(weights, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = model.to(device).eval()
        report[label] = measure(model, tokenizer, 300, 200, 0)
        print(label, json.dumps(report[label]), flush=True)
    report["kappa"]["committed"] = kappa_table(load_file(folder / "model.safetensors"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seconds", type=float, default=420, help="training time")
    parser.add_argument("--jobs", type=int, default=160, help="training text: jobs of 5,000 problems and 2,400 scenes")
    parser.add_argument("--batch", type=int, default=128, help="rows of 256 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the trained fp32 weights (two files)")
    parser.add_argument("--weights", type=Path, help="start from the weights that --keep wrote")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(args.seed).save_pretrained(args.out)
    if args.weights:
        trained = {}
        for part in sorted(args.weights.glob("trained-*.safetensors")):
            trained.update(load_file(part))
        record = json.loads((args.weights / "training.json").read_text())
    else:
        start = time.perf_counter()
        rows = make_rows(args.out, 1000 + args.seed, args.jobs)
        print(f"{len(rows)} rows in {time.perf_counter() - start:.1f} s", flush=True)
        trained, record = train(rows, args.seconds, args.batch, args.seed, device)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            names = sorted(trained)
            for half in range(2):
                shard = {name: trained[name].contiguous() for name in names[half::2]}
                save_file(shard, args.keep / f"trained-{half + 1}.safetensors")
            (args.keep / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    report = {"training": record, **finish(trained, args.out, args.seed, device)}
    (args.out.parent / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
