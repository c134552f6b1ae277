"""Time and memory of `kappaquant export --to mlx`: four layers of Qwen3.6-35B-A3B with a quarter of its experts, 3.8 GB in bf16.

The run is the command itself in a process of its own, start-up and exactness check included. Memory is measured as for
quantize (`benchmarks.quantize_cost`): the resident set summed over the process and its workers. Also the error of the affine
formats on Gaussian weights. A number above its bound ends with exit code 1.

python -m benchmarks.mlx_export
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3_5MoeTextConfig

from benchmarks.environment import environment, save
from benchmarks.quantize_cost import command_cost, write_random
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats import affine
from kappaquant.models.skeleton import parameter_shapes

GIB_RESIDENT = 2.0
LAYERS, EXPERTS = 4, 64
# bits, group size -> relative MSE on Gaussian weights, bfloat16 scales and biases included
BOUNDS = {(3, 128): 0.0325, (4, 128): 0.0085}
FORMATS = [(bits, group) for bits in affine.BITS for group in (128, 64)]


def generate(folder: Path) -> int:
    """Write the checkpoint, a shard per layer and one for both ends, in pieces of 8 million weights; returns its bytes."""
    config = Qwen3_5MoeTextConfig(num_hidden_layers=LAYERS, num_experts=EXPERTS).to_dict()
    config |= {"architectures": ["Qwen3_5MoeForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, list[TensorInfo]] = {}
    for name, shape in parameter_shapes(config).items():
        layer = re.search(r"layers\.(\d+)\.", name)
        number = int(layer[1]) + 2 if layer else 1
        shards.setdefault(f"model-{number:05}-of-{LAYERS + 1:05}.safetensors", []).append(
            TensorInfo(name, "BF16", shape)
        )
    return write_random(folder, shards)


def run(source: Path, output: Path, jobs: int) -> dict[str, Any]:
    """Export once; wall seconds, and of the process tree the processor time and the largest resident set in bytes."""
    cost = command_cost("export", str(source), "-o", str(output), "--to", "mlx", "--jobs", str(jobs))
    report = json.loads((output / "mlx_export.json").read_text())
    return {
        "seconds": round(cost["seconds"], 1), "cpu_seconds": round(cost["cpu_seconds"], 1),
        "peak_gib": round(cost["peak_bytes"] / 2**30, 3),
        "bound_gib": GIB_RESIDENT, "bits_per_weight": report["bits_per_weight"], "exactness": report["exactness"],
    }  # fmt: skip


def errors(rows: int) -> list[dict[str, Any]]:
    """Relative MSE of each format, decoded from what is stored."""
    weight = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(0))
    energy = float(weight.double().square().sum())
    found = []
    for bits, group in FORMATS:
        row: dict[str, Any] = {"bits": bits, "group_size": group, "bits_per_weight": bits + 32 / group}
        for effort in affine.EFFORTS:
            made = affine.quantize(weight, bits, group, torch.bfloat16, effort)
            decoded = affine.dequantize(made.packed, made.scales, made.biases, bits, group)
            row[effort] = float(f"{float((decoded - weight).double().square().sum()) / energy:.4g}")
        found.append({**row, "bound": BOUNDS.get((bits, group))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2048, help="rows of 2048 Gaussian weights")
    parser.add_argument(
        "--folder", type=Path, help="where to put the 3.8 GB and their output; default a temporary folder"
    )
    args = parser.parse_args()
    console, about = Console(), environment()
    formats = errors(args.rows)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="kappaquant-mlx-") as name:
        source = Path(name) / "source"
        source.mkdir()
        total = generate(source)
        os.sync()
        console.print(f"generated {total / 1e9:.2f} GB of bf16 weights")
        cost = run(source, Path(name) / "output", args.jobs)
    table = Table("bits", "group", "bits/weight", "range (fast)", "searched (best)", "bound", title="relative MSE")
    for row in formats:
        table.add_row(*(str(row[k]) for k in ("bits", "group_size", "bits_per_weight", "fast", "best", "bound")))
    console.print(table)
    console.print(f"export: {cost['seconds']} s, {cost['cpu_seconds']} s of processor, peak {cost['peak_gib']} GiB")
    what = "kappaquant export --to mlx (recipe apex2), random bf16 weights, start-up and exactness check included"
    result = {"what": what, "bytes": total, "jobs": args.jobs, "export": cost, "gaussian": formats}
    console.print(f"written: {save('mlx_export', {'environment': about, **result})}")
    missed = [
        f"{r['bits']} bits: {r['best']} is above {r['bound']}" for r in formats if r["bound"] and r["best"] > r["bound"]
    ]
    missed += [f"peak {cost['peak_gib']} GiB is above {GIB_RESIDENT}"] * (cost["peak_gib"] > GIB_RESIDENT)
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
