"""Predicted divergence against measured: plans of many kinds of one model, each quantized and read, beside the plans that evidence makes.

Fixed plans and mixes by chance, in codebooks and, where the evidence has them, in trellis codes; and for the bytes of each fixed plan the one
that the evidence predicts to be closest. Other evidence of the same model (--beside) predicts the same plans. Kept apart: what the evidence
and calibrated rounding read, and the text that is measured on.

python -m benchmarks.plan_prediction MODEL --evidence evidence.json --text held_out.txt [--calibration text.txt] [--mixes 10] [--windows 8]
    [--beside other.json]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from transformers import AutoTokenizer

import kappaquant
from benchmarks.environment import environment, save
from benchmarks.reference_measure import TextYardstick
from benchmarks.reference_table import formats_of, quantized
from kappaquant.checkpoints.open import container_by_id
from kappaquant.evaluate.documents.report import rounded
from kappaquant.formats.kinds import USUAL
from kappaquant.planning.plan import Plan
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.quantizing.calibration.text import Calibration, calibration

WINDOW = 1024
FIXED: dict[str, dict[str, Any]] = {
    **{f"uniform {bits}": {"policy": "uniform", "bits": bits} for bits in (2, 3, 4, 5)},
    **{name: {"policy": "recipe", "recipe": name} for name in ("apex", "apex2", "apex3")},
}
POOLS = ((2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 6), (2, 4, 8), (3, 16))  # widths of which a mix draws for each unit


class Plans:
    """Of one source, all in the groups of its evidence."""

    def __init__(self, source: Any, evidence: Sensitivities) -> None:
        self.source, self.evidence = source, evidence

    def made(self, **options: Any) -> Plan:
        """Like ``make_plan``."""
        group_size = self.evidence.group_size
        return kappaquant.make_plan(self.source.tensors, self.source.config, group_size=group_size, **options)

    def nbytes(self, plan: Plan) -> int:
        """Of the checkpoint's weight files."""
        return container_by_id("kappaquant").output_bytes(self.source.shards, plan.format_of)

    def all(self, mixes: int) -> Iterator[tuple[str, Plan]]:
        """Name and plan."""
        for name, options in FIXED.items():
            fixed = self.made(**options)
            yield name, fixed
            in_all = self.made(**options, kinds=self.evidence.kinds)
            if in_all.choices != fixed.choices:
                yield f"{name}, trellis codes", in_all
            yield (
                f"measured, bytes of {name}",
                self.made(policy="sensitivity", sensitivity=self.evidence, size=self.nbytes(fixed)),
            )
        draw = random.Random(0)
        for number in range(mixes):
            pool = POOLS[number % len(POOLS)]
            widths = [(unit.tensors, draw.choice(pool)) for unit in self.evidence.units]
            overrides = [(name, bits) for names, bits in widths for name in names]
            kinds = USUAL if number < len(POOLS) else self.evidence.kinds
            mix = f"mix {number + 1} of {', '.join(map(str, pool))}{'' if kinds == USUAL else ', trellis codes'}"
            yield mix, self.made(policy="uniform", overrides=overrides, kinds=kinds)


def measure(
    plans: Plans, others: Mapping[str, Sensitivities], yardstick: TextYardstick, text: Calibration | None, mixes: int, device: str,
    console: Console,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each plan, with what the evidence and others predict of it."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for number, (name, plan) in enumerate(plans.all(mixes)):
            packed = quantized(plans.source, plan, Path(work) / str(number), text, device)
            kld = yardstick.read({tensor: weight for tensor, (weight, _) in packed.items()}).figures()["kld_nats"]
            kld.pop("by_position", None)
            formats = formats_of(plan)
            row = {"name": name, "bytes": plans.nbytes(plan), "predicted_kld": plans.evidence.predicted(formats)}
            beside = {"beside": {file: other.predicted(formats) for file, other in others.items()}} if others else {}
            rows.append(row | beside | {"kld_nats": kld})
            console.print(
                f"{name}: predicted {rows[-1]['predicted_kld']:.5f}, measured {kld['mean']:.5f}", highlight=False
            )
    return rows


def agreement(rows: list[dict[str, Any]], predicted: list[float]) -> dict[str, Any]:
    """Rank correlation, and measured over predicted divergence: the least, the middle and the most."""
    measured = [row["kld_nats"]["mean"] for row in rows]
    ratios = sorted(mean / each for mean, each in zip(measured, predicted, strict=True))
    return {
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "measured_over_predicted": [ratios[0], median(ratios), ratios[-1]],
    }


def tried(evidence: Sensitivities) -> str:
    """The width of a kind in which parts were."""
    return f"{evidence.units[0].kind}{evidence.units[0].bits}"


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows, smallest first."""
    made = Table("plan", "MB", "predicted KLD", "measured (95 %)", "measured over predicted")
    for row in sorted(rows, key=lambda row: row["bytes"]):
        kld = row["kld_nats"]
        low, high = kld["interval_95"]
        made.add_row(
            row["name"], f"{row['bytes'] / 1e6:.2f}", f"{row['predicted_kld']:.5f}", f"{kld['mean']:.5f} ({low:.5f} - {high:.5f})",
            f"{kld['mean'] / row['predicted_kld']:.2f}" if row["predicted_kld"] else "",
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--evidence", type=Path, required=True)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="other evidence; repeatable")
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--calibration", type=Path, help="for calibrated rounding; without it effort best")
    parser.add_argument("--calibration-tokens", type=int, default=24 * WINDOW)
    parser.add_argument("--mixes", type=int, default=10)
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, to measure on")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where plans are quantized and read")
    parser.add_argument("--result", required=True, help="its name in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, tokenizer = Console(width=140), AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"][args.skip :]
    windows = [ids[start : start + WINDOW] for start in range(0, min(len(ids), args.windows * WINDOW), WINDOW)]
    text = args.calibration and calibration(args.calibration, tokenizer, args.calibration_tokens)
    plans = Plans(kappaquant.open_source(args.model), Sensitivities.load(args.evidence))
    yardstick = TextYardstick(args.model, lambda _: windows, args.device)
    others = {path.name: Sensitivities.load(path) for path in args.beside}
    rows = measure(plans, others, yardstick, text, args.mixes, args.device, console)
    own = agreement(rows, [row["predicted_kld"] for row in rows])
    beside = {
        name: {"tried": tried(other), **agreement(rows, [row["beside"][name] for row in rows])}
        for name, other in others.items()
    }
    save(args.result, rounded({
        "what": "predicted divergence of plans against measured; made by: python -m benchmarks.plan_prediction",
        "model": args.model.name, "text": {"name": args.text.name, "windows": len(windows), "skipped": args.skip},
        "evidence": {"effort": plans.evidence.effort, "tried": tried(plans.evidence), "text": plans.evidence.text},
        "beside": beside,
        "rounding": text.record if text else "best", "environment": environment(args.device), **own, "rows": rows,
    }))  # fmt: skip
    console.print(table(rows))
    for name, found in {args.evidence.name: own, **beside}.items():
        least, middle, most = found["measured_over_predicted"]
        console.print(
            f"{name}: rank correlation {found['rank_correlation']:.3f}, measured over predicted {least:.2f} to {most:.2f}, {middle:.2f} in "
            "the middle", highlight=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
