"""vLLM with packed weights beside vLLM's own bf16 and fp8, on layers of Qwen3.6-35B-A3B's shape with random weights, on one GPU.

Every variant has a process and an engine with vLLM's default settings: CUDA graphs, compiled layers, chunked prefill. All start at
once, for vLLM takes minutes to, and are measured in turns, several rounds, while the others sleep; the median of the rounds counts, for
hosts are noisy, and a step, the time of 128 more tokens over 128, is a difference whose least would flatter. Beside it the time in which
kernels run, which is what a card that never waits for its host takes.

python -m benchmarks.vllm_serving [--layers 8] [--only apex2 ...] [--folder models]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import vllm_engine
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
ROUNDS = 6
# [rows, tokens of context] of each
CASES = {"step": [(batch, vllm_engine.CONTEXT) for batch in BATCHES], "prompt": list(PROMPTS)}
# what serving is to reach: a packed step, and prompt, in so much of another's time
AIMS = {"step": {"bf16": 0.8, "fp8, online": 1.0}, "prompt": {"bf16": 1.1}}


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


class Variant:
    """``benchmarks.vllm_engine`` for one variant, in a process of its own; as a context, which ends it."""

    def __init__(self, name: str, folder: Path) -> None:
        model, options, engine = VARIANTS[name]
        if engine == "vllm":
            options = {**options, **MEMORY}
            if find_spec("flashinfer") is None:  # its prefill of GatedDeltaNet is vLLM's default on Hopper
                options["additional_config"] = {"gdn_prefill_backend": "triton"}
        self.name = name
        spec = {
            "model": str(folder / model),
            "options": options,
            "engine": engine,
            "batches": BATCHES,
            "prompts": PROMPTS,
        }
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=vllm_engine.answer, args=(theirs, spec))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Variant:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def receive(self) -> Any:
        """The next that the process sends: the bytes of the weights when it is ready, then an answer to each question."""
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit(f"{self.name}: its process ended early; what it printed is above")

    def ask(self, question: str) -> Any:
        """What ``benchmarks.vllm_engine`` answers to "times" or "kernels"."""
        self._connection.send(question)
        return self.receive()


def measure(variants: list[Variant]) -> list[dict[str, Any]]:
    """A row for each variant: ``resident_gb``, and of steps and prompts ``ms`` in every round, their median, and the kernels."""
    resident = [variant.receive() for variant in variants]
    rounds = []
    for number in range(ROUNDS):
        rounds.append([variant.ask("times") for variant in variants])
        print(f"round {number + 1} of {ROUNDS}:", json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    rows = []
    for at, variant in enumerate(variants):
        work = variant.ask("kernels")
        row: dict[str, Any] = {"model": variant.name, "resident_gb": round(resident[at] / 1e9, 3)}
        for key, cases in CASES.items():
            row[key] = []
            for case, (batch, context) in enumerate(cases):
                every = [one[at][key][case] for one in rounds]
                middle = round(median(every), 3)
                row[key].append(
                    {"batch": batch, "context": context, "ms": middle, "rounds_ms": every, **work[key][case]}
                )
        rows.append(row)
    return rows


def aims(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each packed variant of vLLM's against vLLM's own, as far as both were measured; times as users see them, and kernels."""
    at = {row["model"]: row for row in found}
    made: list[dict[str, Any]] = []
    for name, (key, peers) in product(("apex2", "uniform 3"), AIMS.items()):
        for peer, most in peers.items():
            if name not in at or peer not in at:
                continue
            for ours, theirs in zip(at[name][key], at[peer][key], strict=True):
                for time, what in (("ms", key), ("busy_ms", f"kernels of a {key}")):
                    reached = round(ours[time] / theirs[time], 3)
                    case = f"{name}, {ours['batch']} x {ours['context']}, {what}, over {peer}"
                    made.append({"what": case, "reached": reached, "aim": f"<= {most:g}", "met": reached <= most})
    return made


def table(found: list[dict[str, Any]]) -> Table:
    """Steps and prompts (and their kernels alone), and memory, of what was measured."""
    steps = [f"step at {batch}, ms (kernels)" for batch in BATCHES]
    made = Table("model", "weights GB", *steps, *(f"prompt {b} x {c}, ms (kernels)" for b, c in PROMPTS))
    for row in found:
        times = [f"{case['ms']:.2f} ({case['busy_ms']:.2f})" for key in CASES for case in row[key]]
        made.add_row(row["model"], f"{row['resident_gb']:.2f}", *times)
    return made


def profiles(found: list[dict[str, Any]]) -> Iterator[Table]:
    """For each batch what the kernels of a step are for, and of each prompt, in every variant: microseconds (launches)."""
    for key, at in ((key, at) for key, cases in CASES.items() for at in range(len(cases))):
        case = found[0][key][at]
        each = [row[key][at]["purposes"] for row in found]
        purposes = dict.fromkeys(what for of_row in each for what in of_row)
        made = Table(f"{key}, {case['batch']} x {case['context']}, us (launches)", *(row["model"] for row in found))
        for what in purposes:
            cells = (f"{one[what]['us']:.0f} ({one[what]['launches']:.0f})" if what in one else "-" for one in each)
            made.add_row(what, *cells)
        made.add_row("together, less what overlaps", *(f"{1e3 * row[key][at]['busy_ms']:.0f}" for row in found))
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
        os.environ.update(
            HF_HUB_OFFLINE="1",
            VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            VLLM_NO_USAGE_STATS="1",
            VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # functions are sent to the engine's process
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        )
        with ExitStack() as running:
            found = measure([running.enter_context(Variant(name, folder)) for name in names])
            save(options.result, {"environment": about, "rows": found, "aims": aims(found)})
    console = Console(width=160)
    console.print(table(found), *profiles(found))
    for aim in aims(found):
        console.print(
            f"{'met   ' if aim['met'] else 'missed'} {aim['what']}: {aim['reached']} ({aim['aim']})", highlight=False
        )


if __name__ == "__main__":
    main()
