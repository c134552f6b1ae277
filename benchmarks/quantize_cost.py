"""Time and memory of `kappaquant quantize` on a generated checkpoint: four layers of Qwen3.6-35B-A3B, 6.8 GB in bf16.

Each run is the command itself in a process of its own, start-up included. Memory is the resident set summed over the
process and its workers, sampled five times a second; pages that they share count once for each of them. A sum above the
bound, or a slower run, ends with exit code 1. The size of the checkpoint matters: starting up takes about 2 s, which is
0.6 s for each GB of two layers (3.4 GB) and half of that here.

python -m benchmarks.quantize_cost
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from kappaquant.files.safetensors import TensorInfo, build_header

SECONDS_PER_GB = {"fast": 4.0, "best": 6.0}
GIB_RESIDENT = 1.5
TICK = 0.2  # looking through all processes takes 5 ms, of the same two cores
LAYERS = 4  # one period of the model: three GatedDeltaNet, one full attention


def layer(index: int) -> Iterator[TensorInfo]:
    """The matrices of one layer: GatedDeltaNet, and in every fourth layer full attention."""
    mixer: dict[str, tuple[int, ...]]
    if index % 4 == 3:
        mixer = {
            "self_attn.q_proj.weight": (8192, 2048),
            "self_attn.k_proj.weight": (512, 2048),
            "self_attn.v_proj.weight": (512, 2048),
            "self_attn.o_proj.weight": (2048, 4096),
        }
    else:
        mixer = {
            "linear_attn.in_proj_qkv.weight": (8192, 2048),
            "linear_attn.in_proj_z.weight": (4096, 2048),
            "linear_attn.in_proj_a.weight": (32, 2048),
            "linear_attn.in_proj_b.weight": (32, 2048),
            "linear_attn.out_proj.weight": (2048, 4096),
            "linear_attn.conv1d.weight": (8192, 1, 4),
        }
    shapes = {
        **mixer,
        "mlp.gate.weight": (256, 2048),
        "mlp.experts.gate_up_proj": (256, 1024, 2048),
        "mlp.experts.down_proj": (256, 2048, 512),
        "mlp.shared_expert.gate_proj.weight": (512, 2048),
        "mlp.shared_expert.up_proj.weight": (512, 2048),
        "mlp.shared_expert.down_proj.weight": (2048, 512),
        "mlp.shared_expert_gate.weight": (1, 2048),
    }
    for name, shape in shapes.items():
        yield TensorInfo(f"model.layers.{index}.{name}", "BF16", shape)


def generate(folder: Path) -> int:
    """Write the checkpoint, a shard per layer, in pieces of 8 million Gaussian weights; returns its weights' bytes."""
    config = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "num_experts_per_tok": 8}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    shards = {f"model-{i + 1:05}-of-{LAYERS:05}.safetensors": list(layer(i)) for i in range(LAYERS)}
    return write_random(folder, shards)


def write_random(folder: Path, shards: Mapping[str, Sequence[TensorInfo]]) -> int:
    """Write shards of Gaussian weights in bfloat16, and their index; returns the weights' bytes."""
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    for shard, members in shards.items():
        header, stored = build_header(members)
        with (folder / shard).open("wb") as file:
            file.write(header)
            for entry in stored.values():
                file.seek(entry.offset)
                left = entry.info.numel
                while left:
                    piece = torch.empty(min(left, 1 << 23), dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                    file.write(piece.view(torch.uint8).numpy().data)
                    left -= len(piece)
                weight_map[entry.info.name] = shard
                total += entry.info.nbytes
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    return total


def run(source: Path, output: Path, effort: str, jobs: int) -> dict[str, float]:
    """Quantize once; wall seconds, and of the process tree the processor time and the largest resident set in bytes."""
    shutil.rmtree(output, ignore_errors=True)
    options = ["--effort", effort, "--jobs", str(jobs), "--device", "cpu"]
    return command_cost("quantize", str(source), str(output), *options)


def command_cost(*arguments: str) -> dict[str, float]:
    """Run a command of the command line; seconds, and of its process tree processor time and largest resident set in bytes."""
    command = [sys.executable, "-m", "kappaquant.cli", *arguments]
    start, peak = time.perf_counter(), 0
    cpu: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            used = usage(tree)
            peak = max(peak, sum(resident for resident, _ in used.values()))
            cpu |= {pid: seconds for pid, (_, seconds) in used.items()}
            time.sleep(TICK)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(process.stderr.read() if process.stderr else f"{command} failed")
    return {"seconds": seconds, "cpu_seconds": sum(cpu.values()), "peak_bytes": peak}


def usage(tree: psutil.Process) -> dict[int, tuple[int, float]]:
    """Resident bytes and processor seconds of a process and its descendants; one that ends meanwhile is left out."""
    used = {}
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for member in members:
        try:
            times = member.cpu_times()
            used[member.pid] = (member.memory_info().rss, times.user + times.system)
        except psutil.NoSuchProcess:
            continue
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each effort; the fastest is reported")
    parser.add_argument(
        "--folder", type=Path, help="where to put the 6.8 GB and their output; default a temporary folder"
    )
    args = parser.parse_args()
    console, about, results, missed = Console(), environment(), [], []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="kappaquant-cost-") as name:
        source, output = Path(name) / "source", Path(name) / "output"
        source.mkdir()
        total = generate(source)
        os.sync()
        console.print(f"generated {total / 1e9:.2f} GB of bf16 weights")
        for effort, bound in SECONDS_PER_GB.items():
            runs = [run(source, output, effort, args.jobs) for _ in range(args.repeat)]
            result = summarize(effort, bound, runs, total)
            results.append(result)
            missed += [f"{effort}: {result[k]} is above {result[b]} ({k})" for k, b in CHECKS if result[k] > result[b]]
    table = Table(
        "effort", "s/GB", "bound", "CPU s/GB", "peak GiB", "bound", title=f"quantize --jobs {args.jobs}, recipe apex2"
    )
    for r in results:
        table.add_row(
            r["effort"], f"{r['seconds_per_gb']}", f"{r['bound_seconds_per_gb']}", f"{r['cpu_seconds_per_gb']}",
            f"{r['peak_gib']}", f"{r['bound_gib']}",
        )  # fmt: skip
    console.print(table)
    what = "kappaquant quantize (recipe apex2) on four layers of Qwen3.6-35B-A3B, random bf16 weights, command start-up included"
    memory = f"resident set summed over the process tree every {TICK} s; shared pages count once per process"
    result = {"what": what, "memory": memory, "bytes": total, "jobs": args.jobs, "results": results}
    console.print(f"written: {save('quantize_cost', {'environment': about, **result})}")
    if missed:
        sys.exit("\n".join(missed))


CHECKS = (("seconds_per_gb", "bound_seconds_per_gb"), ("peak_gib", "bound_gib"))


def summarize(effort: str, bound: float, runs: list[dict[str, float]], total: int) -> dict[str, Any]:
    """The fastest of the runs, and the most memory of any."""
    seconds = [r["seconds"] for r in runs]
    return {
        "effort": effort,
        "seconds_per_gb": round(min(seconds) / (total / 1e9), 2),
        "bound_seconds_per_gb": bound,
        "cpu_seconds_per_gb": round(min(r["cpu_seconds"] for r in runs) / (total / 1e9), 2),
        "all_seconds": [round(s, 1) for s in seconds],
        "all_cpu_seconds": [round(r["cpu_seconds"], 1) for r in runs],
        "peak_gib": round(max(r["peak_bytes"] for r in runs) / 2**30, 3),
        "bound_gib": GIB_RESIDENT,
    }


if __name__ == "__main__":
    main()
