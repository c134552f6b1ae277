"""What each plan makes of Qwen3.6-35B-A3B: exact sizes from the model's shapes alone, no weights needed.

The shapes are those of transformers' Qwen3_5MoeConfig(), which are this model's, and of its multi-token-prediction head, a
full-attention layer that transformers has no class for.

python -m benchmarks.plan_sizes
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from benchmarks.environment import environment, save
from kappaquant.checkpoints.open import container_by_id
from kappaquant.files.safetensors import TensorInfo
from kappaquant.planning.make import make_plan
from kappaquant.planning.sizes import summary

PLANS: dict[str, dict[str, Any]] = {
    "uniform 3": {"policy": "uniform", "bits": 3},
    "uniform 4": {"policy": "uniform", "bits": 4},
    "apex": {"policy": "recipe", "recipe": "apex"},
    "apex2": {"policy": "recipe", "recipe": "apex2"},
    "apex3": {"policy": "recipe", "recipe": "apex3"},
}
PACK_MTP = [("mtp.layers.*.experts.*", 4)]


def qwen3_6_35b_a3b() -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Every tensor of the model (text, vision tower, prediction head) and its config.json."""
    config: Any = Qwen3_5MoeConfig()
    with torch.device("meta"):
        model = Qwen3_5MoeForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes |= dict(_prediction_head(shapes, config.text_config.hidden_size))
    return {name: TensorInfo(name, "BF16", shape) for name, shape in shapes.items()}, config.to_dict()


def _prediction_head(
    shapes: dict[str, tuple[int, ...]], hidden: int, like: str = "model.language_model.layers.3."
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """One more full-attention layer, what joins the two inputs to it, and their norms."""
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{norm}.weight", (hidden,)
    for name, shape in shapes.items():
        if name.startswith(like):
            yield f"mtp.layers.0.{name.removeprefix(like)}", shape


def measure(options: dict[str, Any], tensors: dict[str, TensorInfo], config: dict[str, Any]) -> dict[str, Any]:
    """Size of the weight file (one shard's header included), and what a decoded token reads."""
    plan = make_plan(tensors, config, **options)
    sizes = summary(plan, tensors, config)
    return {
        "bytes": container_by_id("kappaquant").output_bytes({"model.safetensors": tensors}, plan.format_of),
        "bits_per_weight": round(sizes.bits_per_weight, 4),
        "active_bytes_per_token": sizes.active_bytes_per_token,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    tensors, config = qwen3_6_35b_a3b()
    before = sum(info.nbytes for info in tensors.values())
    title = f"Qwen3.6-35B-A3B: {sum(info.numel for info in tensors.values()) / 1e9:.1f} B weights, {before / 1e9:.1f} GB in bf16"
    table = Table("plan", "GB", "bits/weight", "GB per token", "GB with the MTP experts at 4 bits", title=title)
    results = {}
    for name, options in PLANS.items():
        kept, packed = measure(options, tensors, config), measure({**options, "overrides": PACK_MTP}, tensors, config)
        results[name] = {"mtp_kept": kept, "mtp_experts_4_bits": packed}
        table.add_row(
            name, f"{kept['bytes'] / 1e9:.2f}", f"{kept['bits_per_weight']:.2f}",
            f"{kept['active_bytes_per_token'] / 1e9:.2f}", f"{packed['bytes'] / 1e9:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    result = {"model": "Qwen3.6-35B-A3B", "source_bytes": before, "plans": results}
    console.print(f"written: {save('plan_sizes', {'environment': environment(), **result})}")


if __name__ == "__main__":
    main()
