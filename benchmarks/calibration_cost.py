"""Time and memory of calibrated rounding on layers of Qwen3.6-35B-A3B's exact shape, random weights and tokens, on the GPUs of a host.

All 40 layers are 71 GB on disk; of fewer, the time is said for 40 at their pace, the beginning and the vocabulary counted as often. The
bounds are for one GPU: 20 minutes for 128 thousand tokens, 16 GiB of GPU memory, 8 GiB of the host's.

With --evidence the same of ``calibrate``: 15 minutes for 8 thousand tokens, and what the GPU holds beside one layer in float32 are the
states of variants, where they fit. A layer there carries the variants of those below, so its
time grows; a line through the layers' times is followed up to the 40th.

python -m benchmarks.calibration_cost [--evidence] [--layers 4] [--tokens 131072] [--device cuda] [--folder models]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from benchmarks.gpu_decode import qwen3_6
from kappaquant.models.skeleton import load_config
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.sources.source import Source

ALL_LAYERS = 40
MINUTES, GPU_GIB, HOST_GIB = {"quantize": 20, "calibrate": 15}, 16, 8
TOKENS = {"quantize": 128 * 1024, "calibrate": 8 * 1024}
WINDOW = 1024
Work = Callable[[Path, Path, int, str, dict[str, Any]], dict[str, Any]]


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
    """Quantize once, in this process; seconds, those of 40 layers, and the most that the GPU held."""
    import kappaquant

    opened, text = _opened(source, tokens)
    made = kappaquant.make_plan(opened.tensors, opened.config, **plan)
    begin = time.perf_counter()
    kappaquant.quantize(opened, output, made, kappaquant.Options(device=device), calibration=text)
    seconds = time.perf_counter() - begin
    layers = load_config(opened.config).get_text_config().num_hidden_layers
    return {"seconds": seconds, "seconds_40_layers": seconds / layers * ALL_LAYERS, "gpu_bytes": _gpu_bytes(device)}


def calibrate(source: Path, output: Path, tokens: int, device: str, plan: dict[str, Any]) -> dict[str, Any]:
    """The same for evidence; and the seconds of each layer, the last of them the comparison of logits."""
    from kappaquant.quantizing.calibration.sensitivity import sensitivities
    from kappaquant.quantizing.calibration.trials import Trial

    opened, text = _opened(source, tokens)
    begin, at = time.perf_counter(), list[float]()

    def report(done: int, total: int) -> None:
        at.append(time.perf_counter())
        print(f"{done} of {total} layers after {at[-1] - begin:.1f} s", file=sys.stderr, flush=True)

    sensitivities(opened, text, Trial(), device, report=report)
    took = [end - start for start, end in pairwise((*at, time.perf_counter()))][:-1]
    comparing = time.perf_counter() - at[-1]
    whole = at[0] - begin + followed(took, load_config(opened.config).get_text_config().layer_types)
    return {
        "seconds": time.perf_counter() - begin, "seconds_40_layers": whole + comparing / len(took) * ALL_LAYERS,
        "layers_seconds": took, "comparing_seconds": comparing, "gpu_bytes": _gpu_bytes(device),
    }  # fmt: skip


def followed(took: list[float], kinds: list[str]) -> float:
    """Seconds of all 40 layers: a line through those measured, which lies higher for each kind; the first of a kind makes kernels."""
    names = sorted(set(kinds))
    known = [number for number, kind in enumerate(kinds) if kind in kinds[:number]]
    if len(known) <= len(names):
        sys.exit(f"{len(took)} layers are too few to say what 40 take; use --layers 8")
    rows = np.array([[number, *(kinds[number] == name for name in names)] for number in known], float)
    slope, *starts = np.linalg.lstsq(rows, np.array(took)[known], rcond=None)[0]
    every = [kinds[number % len(kinds)] for number in range(ALL_LAYERS)]
    return sum(slope * number + starts[names.index(kind)] for number, kind in enumerate(every))


def _opened(source: Path, tokens: int) -> tuple[Source, Calibration]:
    """The model, and random tokens as its text."""
    import kappaquant

    opened = kappaquant.open_source(source)
    vocabulary = load_config(opened.config).get_text_config().vocab_size
    windows = torch.randint(0, vocabulary, (tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    return opened, Calibration(
        windows, {"file": "random", "tokens": windows.numel(), "window": WINDOW, "tokens_sha256": ""}
    )


def _gpu_bytes(device: str) -> int:
    return torch.cuda.max_memory_reserved() if device.startswith("cuda") else 0


def _child(connection: Any, work: Work, *args: Any) -> None:
    connection.send(work(*args))


def measured(work: Work, *args: Any) -> dict[str, Any]:
    """``work`` in a process of its own, and the largest private memory of its tree: what it maps of files it can give back."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, work, *args))
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
    parser.add_argument("--layers", type=int, help="4 unless given, and 8 with --evidence")
    parser.add_argument("--evidence", action="store_true", help="calibrate, in place of quantize")
    parser.add_argument(
        "--tokens", type=int, help=f"{TOKENS['quantize']} unless given, and {TOKENS['calibrate']} with --evidence"
    )
    parser.add_argument("--device", default="cuda", help="cuda for all GPUs, cuda:0 for one")
    parser.add_argument(
        "--folder", type=Path, help="where the model lies, or is made and kept; default for this run only"
    )
    parser.add_argument(
        "--result", help="its name in benchmarks/results; calibration_cost or evidence_cost unless given"
    )
    options = parser.parse_args()
    work: Work = calibrate if options.evidence else quantize
    what, tokens = work.__name__, options.tokens or TOKENS[work.__name__]
    layers = options.layers or (8 if options.evidence else 4)
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; python -m benchmarks.real_model times a small model on CPUs")
    with tempfile.TemporaryDirectory(prefix="kappaquant-calibration-") as temporary:
        source = (options.folder or Path(temporary)) / f"bf16-{layers}"
        build(source, layers)
        torch.cuda.empty_cache()
        plan = {"policy": "recipe", "recipe": "apex2"}
        found = measured(work, source, Path(temporary) / "out", tokens, options.device, plan)
    row = {
        **found, "what": what, "gpus": torch.cuda.device_count() if options.device == "cuda" and what == "quantize" else 1,
        "layers": layers, "tokens": tokens, "minutes_40_layers": found["seconds_40_layers"] / 60,
    }  # fmt: skip
    result = options.result or ("evidence_cost" if options.evidence else "calibration_cost")
    save(result, {"environment": environment("cuda"), "plan": None if options.evidence else plan, "rows": [row]})
    table = Table("GPUs", "layers", "s", "min for 40", "GPU GiB", "host GiB (private)")
    table.add_row(
        f"{row['gpus']}", f"{layers}", f"{row['seconds']:.0f}", f"{row['minutes_40_layers']:.1f} (<= {MINUTES[what]})",
        f"{row['gpu_bytes'] / 2**30:.1f}" + f" (<= {GPU_GIB})" * (not options.evidence),
        f"{row['host_bytes'] / 2**30:.1f} ({row['host_private_bytes'] / 2**30:.1f}; <= {HOST_GIB})",
    )  # fmt: skip
    Console(width=140).print(table)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
