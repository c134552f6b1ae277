"""vLLM with packed weights beside vLLM's own bf16 and fp8, on layers of Qwen3.6-35B-A3B's shape with random weights, on one GPU.

Every variant has a process and an engine with vLLM's default settings: CUDA graphs, compiled layers, chunked prefill. All start at
once, for vLLM takes minutes to, and are measured one after another while the others sleep. A step is the time of 128 more tokens over
128; beside it the time in which kernels run, which is what a card that never waits for its host takes.

python -m benchmarks.vllm_serving [--layers 8] [--only apex2 ...] [--folder models]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT, environment, save
from benchmarks.gpu_decode import qwen3_6

# of each vLLM; all of them share a card while they start
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 6 << 30}
BATCHES = (1, 8, 32, 128)
PROMPTS = ((1, 512), (1, 2048), (8, 2048))
# name -> (folder, options of vLLM's LLM, engine)
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bf16": ("bf16", {}, "vllm"),
    "fp8, online": ("bf16", {"quantization": "fp8"}, "vllm"),
    "apex2": ("apex2", {}, "vllm"),
    "uniform 3": ("uniform3", {}, "vllm"),
    "apex2, kappaquant's decoder": ("apex2", {}, "kappaquant"),
}
PLANS: dict[str, dict[str, Any]] = {
    "apex2": {"policy": "recipe", "recipe": "apex2"},
    "uniform3": {"policy": "uniform", "bits": 3},
}
# what serving is to reach: a packed step in so much of another's time, at every batch; and prompts
STEP_AIMS = {"bf16": 0.8, "fp8, online": 1.0}
PROMPT_AIMS = {"bf16": 1.1}


def build(folder: Path, layers: int, wanted: set[str]) -> None:
    """Save the model in bfloat16, and quantized by each plan that is wanted, unless they are there."""
    import kappaquant

    source = folder / "bf16"
    if not (source / "config.json").exists():
        from transformers import Qwen3_5MoeForCausalLM

        torch.manual_seed(0)
        config = qwen3_6(layers)
        config.dtype = torch.bfloat16
        with torch.device("cuda"):
            Qwen3_5MoeForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(source)
        torch.cuda.empty_cache()
    opened = kappaquant.open_source(source)
    for name in sorted(wanted - {"bf16"}):
        if not (folder / name).exists():
            plan = kappaquant.make_plan(opened.tensors, opened.config, **PLANS[name])
            kappaquant.quantize(opened, folder / name, plan, kappaquant.Options(effort="fast", device="cuda"))


class Started:
    """``benchmarks.vllm_engine`` for one variant, in a process of its own that loads its model and then waits for ``measure``."""

    def __init__(self, name: str, folder: Path) -> None:
        model, options, engine = VARIANTS[name]
        if engine == "vllm":
            options = {**options, **MEMORY}
            if find_spec("flashinfer") is None:  # its prefill of GatedDeltaNet is vLLM's default on Hopper
                options["additional_config"] = {"gdn_prefill_backend": "triton"}
        spec, self._out = (folder / f"{name} {what}.json" for what in ("spec", "out"))
        self._ready = folder / f"{name} ready"
        for left in (self._out, self._ready):
            left.unlink(missing_ok=True)
        asked = {
            "name": name, "model": str(folder / model), "options": options, "engine": engine, "batches": BATCHES, "prompts": PROMPTS,
        }  # fmt: skip
        spec.write_text(json.dumps(asked))
        inside = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the engine's process
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", "benchmarks.vllm_engine", *map(str, (spec, self._out, self._ready))]
        self.name = name
        self._process = subprocess.Popen(command, env=inside, cwd=folder, stdin=subprocess.PIPE, stdout=sys.stderr)

    def wait_until_ready(self) -> None:
        """Return when the model is loaded and its graphs are captured."""
        while not self._ready.exists():
            self._check()
            time.sleep(0.5)

    def measure(self) -> dict[str, Any]:
        """What ``benchmarks.vllm_engine.measure`` says; the process ends."""
        self._process.communicate(b"")  # it reads to the end of its input before it begins
        self._check()
        return json.loads(self._out.read_text())

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _check(self) -> None:
        if self._process.poll():
            sys.exit(f"{self.name}: ended with status {self._process.returncode}; what it printed is above")


def aims(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each packed variant of vLLM's against vLLM's own, as far as both were measured; steps as users see them, and their kernels."""
    at = {row["model"]: row for row in found}
    made: list[tuple[str, float, float]] = []
    for name, peer in product(("apex2", "uniform 3"), (*STEP_AIMS, *PROMPT_AIMS)):
        if name not in at or peer not in at:
            continue
        steps, prompts = (list(zip(at[name][key], at[peer][key], strict=True)) for key in ("steps", "prompts"))
        for key, what in (("step_ms", "step"), ("busy_ms", "kernels of a step")):
            for ours, theirs in steps if peer in STEP_AIMS else ():
                ratio = ours[key] / theirs[key]
                made.append((f"{name}, batch {ours['batch']}, {what}, over {peer}", ratio, STEP_AIMS[peer]))
        for ours, theirs in prompts if peer in PROMPT_AIMS else ():
            ratio = ours["first_token_ms"] / theirs["first_token_ms"]
            made.append((f"{name}, prompt {ours['batch']} x {ours['context']}, over {peer}", ratio, PROMPT_AIMS[peer]))
    unique = dict.fromkeys(made)
    return [{"what": w, "reached": round(v, 3), "aim": f"<= {most:g}", "met": v <= most} for w, v, most in unique]


def table(found: list[dict[str, Any]]) -> Table:
    """Steps (and their kernels alone), prompts and memory of what was measured."""
    steps = [f"step at {batch}, ms (kernels)" for batch in BATCHES]
    made = Table("model", "weights GB", *steps, *(f"prompt {b} x {c}, ms" for b, c in PROMPTS))
    for row in found:
        times = [f"{step['step_ms']:.2f} ({step['busy_ms']:.2f})" for step in row["steps"]]
        first = [f"{prompt['first_token_ms']:.1f}" for prompt in row["prompts"]]
        made.add_row(row["model"], f"{row['resident_gb']:.2f}", *times, *first)
    return made


def profiles(found: list[dict[str, Any]]) -> Iterator[Table]:
    """For each batch what the kernels of a step are for, in every variant: microseconds (launches)."""
    for at, step in enumerate(found[0]["steps"]):
        each = [row["steps"][at]["purposes"] for row in found]
        purposes = dict.fromkeys(what for of_row in each for what in of_row)
        made = Table(f"batch {step['batch']}, us (launches)", *(row["model"] for row in found))
        for what in purposes:
            cells = (f"{one[what]['us']:.0f} ({one[what]['launches']:.0f})" if what in one else "-" for one in each)
            made.add_row(what, *cells)
        made.add_row("together, less what overlaps", *(f"{1e3 * row['steps'][at]['busy_ms']:.0f}" for row in found))
        yield made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", action="append", choices=VARIANTS, help="a variant; may be given several times")
    parser.add_argument(
        "--folder", type=Path, help="where the models lie, or are made and kept; by default for this run only"
    )
    parser.add_argument("--result", default="vllm_serving", help="its name in benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; vLLM on CPUs is tested by make test-vllm, and not timed")
    if find_spec("vllm") is None:
        sys.exit("needs vLLM 0.32 or newer beside kappaquant: pip install '.[vllm]'")
    names = options.only or list(VARIANTS)
    with tempfile.TemporaryDirectory(prefix="kappaquant-vllm-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, options.layers, {VARIANTS[name][0] for name in names})
        about = environment("cuda") | {"vllm": version("vllm"), "triton": version("triton"), "layers": options.layers}
        found: list[dict[str, Any]] = []
        with ExitStack() as running:
            started = [Started(name, folder) for name in names]
            for each in started:
                running.callback(each.stop)
            for each in started:
                each.wait_until_ready()
            for each in started:
                found.append(each.measure())
                save(options.result, {"environment": about, "rows": found, "aims": aims(found)})  # keeps what it has
    console = Console(width=160)
    console.print(table(found), *profiles(found))
    for aim in aims(found):
        console.print(
            f"{'met   ' if aim['met'] else 'missed'} {aim['what']}: {aim['reached']} ({aim['aim']})", highlight=False
        )


if __name__ == "__main__":
    main()
