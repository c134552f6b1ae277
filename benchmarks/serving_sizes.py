"""What each card of a server holds of two mixture-of-experts models under apex2: exact, from shapes alone, no weights needed.

The shapes are those of Qwen3.6-35B-A3B (``benchmarks.plan_sizes``) and of Qwen3-235B-A22B.

python -m benchmarks.serving_sizes
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.environment import environment, save
from benchmarks.plan_sizes import qwen3_6_35b_a3b
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models import sharding as parallel
from kappaquant.models.keys_values import kv_bytes
from kappaquant.planning.make import make_plan

CARDS = (1, 2, 4, 8)
GROUPS = (128, 64)
QWEN3_235B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
}
Model = tuple[dict[str, TensorInfo], dict[str, Any]]


def qwen3_235b_a22b() -> Model:
    """Every tensor of the model, experts stacked, and its config.json."""
    config: Any = Qwen3MoeConfig(**QWEN3_235B)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    return {name: TensorInfo(name, "BF16", tuple(t.shape)) for name, t in model.state_dict().items()}, config.to_dict()


def measure(model: Model, group_size: int, cards: int, expert_parallel: bool) -> dict[str, Any]:
    """Bytes a card holds, and why so many cards cannot share the model, if they cannot."""
    tensors, config = model
    plan = make_plan(tensors, config, "recipe", recipe="apex2", group_size=group_size)
    what = tensors, plan.format_of, config, cards
    return {
        "weights": parallel.bytes_per_card(*what, expert_parallel=expert_parallel),
        "kv_per_token": kv_bytes(config, 1, cards),
        "problem": next(parallel.problems(*what, expert_parallel=expert_parallel), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {}
    for name, model in {"Qwen3.6-35B-A3B": qwen3_6_35b_a3b(), "Qwen3-235B-A22B": qwen3_235b_a22b()}.items():
        table = Table("cards", "group", "experts", "GB of weights each", "KiB a token each", "refused", title=name)
        rows = results[name] = []
        for cards in CARDS:
            for group_size in GROUPS:
                for expert_parallel in (False, True)[: 1 + (cards > 1)]:
                    row = measure(model, group_size, cards, expert_parallel)
                    rows.append({"cards": cards, "group_size": group_size, "expert_parallel": expert_parallel, **row})
                    table.add_row(
                        f"{cards}", f"{group_size}", "dealt out" if expert_parallel else "cut", f"{row['weights'] / 1e9:.2f}",
                        f"{row['kv_per_token'] / 1024:.1f}", row["problem"] or "",
                    )  # fmt: skip
        console.print(table)
    console.print(
        f"written: {save('serving_sizes', {'environment': environment(), 'plan': 'apex2', 'models': results})}"
    )


if __name__ == "__main__":
    main()
