"""The whole way on the small trained model of reference/: scan, plan, quantize, evaluate, and one answer.

Scanning and quantizing are printed as the commands that do the same.

python -m scripts.demo [--results]

Everything it makes lies in demo/ afterwards: profile.json, kappa.png, a plan and a checkpoint per variant, results.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import kappaquant
from benchmarks.environment import ROOT, environment, save
from kappaquant import evaluate
from kappaquant.commands.plots import kurtosis_by_layer
from kappaquant.commands.tables import profile_table
from kappaquant.planning import profile as scanner
from kappaquant.planning.sizes import summary
from kappaquant.quantizing.calibration.text import Calibration, calibration_of_texts
from kappaquant.quantizing.calibration.written import header_of
from kappaquant.runtime.generate import stream
from kappaquant.runtime.writing import write
from kappaquant.sources.source import Source
from reference.text import extract_answer, problems, scenes

MODEL = ROOT / "reference" / "model"
OUTPUT = ROOT / "demo"
VARIANTS: dict[str, dict[str, Any]] = {
    "uniform 2": {"policy": "uniform", "bits": 2},  # too few: what it looks like when a model breaks
    "uniform 2, calibrated": {"policy": "uniform", "bits": 2},
    "uniform 3": {"policy": "uniform", "bits": 3},
    "recipe apex2": {"policy": "recipe", "recipe": "apex2"},
    "kurtosis": {"policy": "kurtosis"},
}
CALIBRATED = ", calibrated"
TOKENS = 8192  # that the model writes for its calibration: a quarter of what the command asks for, and of its time
SHOWN = "recipe apex2"  # the variant that answers at the end
MAX_NEW_TOKENS = 80  # the longest worked answer takes 61


@dataclass(frozen=True)
class HeldOut:
    """Text the model has never seen: problems with answers, and token sequences of problems and prose."""

    questions: list[evaluate.Question[int]]
    sequences: list[list[int]]

    @classmethod
    def make(cls, tokenizer: Any, n_problems: int, n_texts: int) -> HeldOut:
        asked = problems(0, n_problems)
        texts = [p.prompt + p.worked for p in asked[:n_texts]] + scenes(0, n_texts)
        questions = [evaluate.Question(p.prompt, p.answer) for p in asked]
        return cls(questions, evaluate.windows(tokenizer, texts))

    def measure(self, model: Any, tokenizer: Any, original: Any = None) -> dict[str, Any]:
        """Exact match and perplexity; with the original also the divergence from it."""
        match = evaluate.exact_match(model, tokenizer, self.questions, extract_answer, max_new_tokens=MAX_NEW_TOKENS)
        if original is None:
            return {"exact_match": match, "perplexity": evaluate.perplexity(model, self.sequences)}
        found = evaluate.kl_divergence(model, original, self.sequences)
        return {"exact_match": match, "perplexity": found.perplexity, "divergence": found}


class Step:
    """A line that says what is being done, and for how long."""

    def __init__(self, console: Console, text: str) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="•"), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self._task = self._progress.add_task(text, total=1)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.update(self._task, completed=1)
        self._progress.stop()


def quantize_all(
    source: Source, profile: scanner.Profile, calibration: Calibration, console: Console
) -> dict[str, tuple[Path, float]]:
    """Variant -> its checkpoint and bits per weight."""
    made = {}
    for name, options in VARIANTS.items():
        folder = OUTPUT / name.replace(",", "").replace(" ", "-")
        show(quantizing(name, str(source.folder), folder), console)
        with Step(console, f"plan and quantize {name}"):
            plan = kappaquant.make_plan(source.tensors, source.config, profile=profile.kurtosis(), **options)
            plan.save(folder.with_suffix(".plan.json"))
            kappaquant.quantize(source, folder, plan, calibration=calibration if name.endswith(CALIBRATED) else None)
        made[name] = folder, summary(plan, source.tensors, source.config).bits_per_weight
    return made


def quantizing(name: str, model: str, folder: Path) -> list[str]:
    """What the command kappaquant takes to make a variant."""
    options = [part for key, value in VARIANTS[name].items() for part in (f"--{key}", str(value))]
    if VARIANTS[name]["policy"] == "kurtosis":
        options += ["--profile", str(OUTPUT / "profile.json")]
    if name.endswith(CALIBRATED):
        options += ["--effort", "calibrated", "--calibration-tokens", str(TOKENS)]
    return ["quantize", model, "-o", str(folder), *options]


def show(arguments: list[str], console: Console) -> None:
    """Print a command as one types it at the root of the repository."""
    line = shlex.join(["kappaquant", *(part.removeprefix(f"{ROOT}/") for part in arguments)])
    console.print(f"$ {line}", style="dim", markup=False, highlight=False, soft_wrap=True)


def written(source: Source, model: Any, tokenizer: Any) -> Calibration:
    """The text that ``--effort calibrated`` lets the model write."""
    return calibration_of_texts(write(model, tokenizer, TOKENS), header_of(source, TOKENS), tokenizer, TOKENS)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def results_table(variants: list[evaluate.Variant], held_out: HeldOut) -> Table:
    table = Table(title="reference model, held-out text", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in ("MB", "bits/weight", "KLD against bf16", "perplexity", "exact match", "95 % interval"):
        table.add_column(column, justify="right")
    for v in variants:
        kld, match = v.divergence, v.exact_match
        assert match
        low, high = match.interval()
        table.add_row(
            v.name, f"{v.nbytes / 1e6:.2f}", f"{v.bits_per_weight:.2f}",
            f"{kld.mean:.5f} ± {kld.mean_error:.5f}" if kld else "–", f"{v.perplexity.value:.3f}",
            f"{match.hits}/{match.n} = {match.share:.1%}", f"{low:.1%} – {high:.1%}",
        )  # fmt: skip
    table.caption = (
        f"{variants[0].perplexity.tokens} predicted tokens in {len(held_out.sequences)} texts; KLD: mean, in nats, "
        "± standard error over texts; computed in float32, products of packed weights with int8 inputs; exact match: greedy, Wilson interval"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="the trained model's folder")
    parser.add_argument("--problems", type=int, default=300, help="questions for exact match")
    parser.add_argument("--texts", type=int, default=120, help="worked problems, and as many scenes of prose, for KLD")
    parser.add_argument("--results", action="store_true", help="also write benchmarks/results/demo.json")
    args = parser.parse_args()
    start, about = time.perf_counter(), environment()
    torch.set_num_threads(
        1
    )  # tensors this small gain nothing from more, and on a busy machine threads wait for each other
    console = Console(width=None if sys.stdout.isatty() else 140)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    OUTPUT.mkdir()

    source = kappaquant.open_source(args.model)
    show(["scan", str(args.model), "-o", str(OUTPUT / "profile.json"), "--plot", str(OUTPUT / "kappa.png")], console)
    with Step(console, "scan"):
        profile = kappaquant.scan(source)
    profile.save(OUTPUT / "profile.json")
    kurtosis_by_layer(profile, OUTPUT / "kappa.png", {"4": 4, "8": 8, "15": 15})
    console.print(profile_table(profile))

    # float32 arithmetic on both sides: bf16's own rounding would drown the smaller divergences
    original: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with Step(console, f"the model writes {TOKENS} tokens for its calibration"):
        calibration = written(source, original, tokenizer)
    made = quantize_all(source, profile, calibration, console)
    held_out = HeldOut.make(tokenizer, args.problems, args.texts)
    with Step(console, "evaluate bf16"):
        variants = [evaluate.Variant("bf16", weight_bytes(args.model), 16.0, **held_out.measure(original, tokenizer))]
    for name, (folder, bits_per_weight) in made.items():
        with Step(console, f"load and evaluate {name}"):
            model, _ = kappaquant.load(folder, dtype=torch.float32)
            found = held_out.measure(model, tokenizer, original)
        variants.append(evaluate.Variant(name, weight_bytes(folder), bits_per_weight, **found))
    console.print(results_table(variants, held_out))

    seconds = round(time.perf_counter() - start, 1)
    what = "reference model on held-out problems and prose; made by: make demo"
    result = evaluate.json_report(variants, {"environment": about, "what": what, "seconds": seconds})
    (OUTPUT / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.results:
        save("demo", result)
    answer(made[SHOWN][0], held_out.questions[0].prompt, console)
    console.print(f"\n{seconds} s in all; everything made lies in {OUTPUT.name}/", highlight=False)


def answer(folder: Path, prompt: str, console: Console) -> None:
    """Print a problem and, token by token, the variant's answer."""
    model, tokenizer = kappaquant.load(folder)
    console.print(f"\n[bold]{SHOWN} answers[/]\n{prompt}", end="", highlight=False)
    for piece in stream(model, tokenizer, prompt, max_new_tokens=MAX_NEW_TOKENS):
        console.print(piece, end="", markup=False, highlight=False, style="green", soft_wrap=True)
    console.print()


if __name__ == "__main__":
    main()
