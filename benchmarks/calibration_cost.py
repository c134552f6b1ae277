"""Time and memory of calibrated rounding on layers of Qwen3.6-35B-A3B's exact shape, random weights and tokens, on the GPUs of a host.

All 40 layers are 71 GB on disk; of fewer, the time is said for 40 at their pace, the beginning and the vocabulary counted as often. The
bounds are for one GPU: 20 minutes for 128 thousand tokens, 16 GiB of GPU memory, 8 GiB of the host's.

python -m benchmarks.calibration_cost [--layers 4] [--tokens 131072] [--device cuda] [--folder models]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from benchmarks.gpu_decode import qwen3_6

ALL_LAYERS = 40
MINUTES, GPU_GIB, HOST_GIB = 20, 16, 8
WINDOW = 1024


def build(folder: Path, layers: int) -> None:
    """Save the model in bfloat16, unless it is there."""
    from transformers import Qwen3_5MoeForCausalLM

    if (folder / "config.json").exists():
        return
    config = qwen3_6(layers)
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    with torch.device("cuda"):
        Qwen3_5MoeForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def quantize(source: Path, output: Path, tokens: int, device: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Quantize once, in this process; seconds, and the most that the GPU held."""
    import kappaquant
    from kappaquant.models.skeleton import load_config
    from kappaquant.quantizing.calibration.text import Calibration

    opened = kappaquant.open_source(source)
    vocabulary = load_config(opened.config).get_text_config().vocab_size
    windows = torch.randint(0, vocabulary, (tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    record = {"file": "random", "tokens": windows.numel(), "window": WINDOW, "tokens_sha256": ""}
    made = kappaquant.make_plan(opened.tensors, opened.config, **plan)
    begin = time.perf_counter()
    kappaquant.quantize(
        opened, output, made, kappaquant.Options(device=device), calibration=Calibration(windows, record)
    )
    return {
        "seconds": time.perf_counter() - begin,
        "gpu_bytes": torch.cuda.max_memory_reserved() if device.startswith("cuda") else 0,
    }


def _child(connection: Any, *args: Any) -> None:
    connection.send(quantize(*args))


def measured(*args: Any) -> dict[str, Any]:
    """``quantize`` in a process of its own, and the largest private memory of its tree: what it maps of files it can give back."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, *args))
    process.start()
    theirs.close()
    resident = private = 0
    tree = psutil.Process(process.pid)
    while not ours.poll(0.2):
        if not process.is_alive():
            sys.exit("the run failed; what it printed is above")
        used = [memory_of(member) for member in (tree, *tree.children(recursive=True))]
        resident = max(resident, sum(both[0] for both in used))
        private = max(private, sum(both[1] for both in used))
    found = ours.recv()
    process.join()
    return {**found, "host_bytes": resident, "host_private_bytes": private}


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """(resident bytes, those of them that are no file's pages) of a process; nothing of one that has ended."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0, 0
    sizes = {
        key: int(kib) * 1024 for key, kib in re.findall(r"^(VmRSS|RssAnon|RssShmem):\s+(\d+) kB", text, re.MULTILINE)
    }
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128 * WINDOW)
    parser.add_argument("--device", default="cuda", help="cuda for all GPUs, cuda:0 for one")
    parser.add_argument(
        "--folder", type=Path, help="where the model lies, or is made and kept; default for this run only"
    )
    parser.add_argument("--result", default="calibration_cost", help="its name in benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; python -m benchmarks.real_model times a small model on CPUs")
    with tempfile.TemporaryDirectory(prefix="kappaquant-calibration-") as temporary:
        source = (options.folder or Path(temporary)) / f"bf16-{options.layers}"
        build(source, options.layers)
        torch.cuda.empty_cache()
        plan = {"policy": "recipe", "recipe": "apex2"}
        found = measured(source, Path(temporary) / "out", options.tokens, options.device, plan)
    row = {
        **found, "gpus": torch.cuda.device_count() if options.device == "cuda" else 1, "layers": options.layers,
        "tokens": options.tokens,
        "minutes_40_layers": found["seconds"] / options.layers * ALL_LAYERS / 60,
    }  # fmt: skip
    save(options.result, {"environment": environment("cuda"), "plan": plan, "rows": [row]})
    table = Table("GPUs", "layers", "s", "min for 40", "GPU GiB", "host GiB (private)")
    table.add_row(
        f"{row['gpus']}", f"{options.layers}", f"{row['seconds']:.0f}", f"{row['minutes_40_layers']:.1f} (<= {MINUTES})",
        f"{row['gpu_bytes'] / 2**30:.1f} (<= {GPU_GIB})",
        f"{row['host_bytes'] / 2**30:.1f} ({row['host_private_bytes'] / 2**30:.1f}; <= {HOST_GIB})",
    )  # fmt: skip
    Console(width=140).print(table)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
