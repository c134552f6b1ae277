"""The reference model at 2 and 3 bits, without text and calibrated: on text of its own, and on text of the kind that it was trained on.

python -m benchmarks.reference_calibrated [--texts 80] [--problems 300] [--draws 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import kappaquant
from benchmarks.environment import environment, save
from benchmarks.reference_measure import Reading, Yardstick, answered, kld_difference
from benchmarks.reference_peers import Weights
from benchmarks.reference_table import MODEL, Row, quantized
from kappaquant.evaluate.documents.report import rounded
from kappaquant.evaluate.measures.intervals import clustered_mean
from kappaquant.quantizing.calibration.text import Calibration, calibration, calibration_of_texts
from kappaquant.quantizing.calibration.written import TOKENS, Header, Rules, model_of, seeds_digest
from kappaquant.runtime.writing import write
from reference.build import END
from reference.text import problems, scenes

FEWER = 8192  # as the demo has it
BITS = (2, 3)


class Texts:
    """What is calibrated on.

    Args:
        yardstick: its model writes.
        work: for the file.
    """

    def __init__(self, source: Any, yardstick: Yardstick, work: Path) -> None:
        self._model, self._tokenizer, self._work = yardstick.model, yardstick.tokenizer, work
        self._writer = model_of(source)
        self._written: dict[int, list[str]] = {}

    def own(self, tokens: int, draw: int) -> Calibration:
        """What ``--effort calibrated`` calibrates on; draws after the first are sampled with another seed.

        Each draw is written once: a shorter text is the beginning of a longer one.
        """
        header = Header(self._writer, seeds_digest(), tokens, Rules(seed=draw))
        if draw not in self._written:
            self._written[draw] = write(self._model, self._tokenizer, TOKENS, header.rules)
        return calibration_of_texts(self._written[draw], header, self._tokenizer, tokens)

    def of_the_kind(self, tokens: int, draw: int) -> Calibration:
        """Problems and prose of the training split, in turn: no held-out text is among them."""
        told = zip(problems(draw, tokens // 64, "train"), scenes(draw, tokens // 64, "train"), strict=True)
        file = self._work / "training split.txt"
        file.write_text("".join(p.prompt + p.worked + END + s + END for p, s in told), encoding="utf-8")
        return calibration(file, self._tokenizer, tokens)


def measure(folder: Path, texts: int, asked: int, draws: int, console: Console) -> dict[str, Any]:
    """All rows, as JSON values."""
    start, about = time.perf_counter(), environment()
    with tempfile.TemporaryDirectory() as work:
        yardstick = Yardstick(folder, texts, asked)
        source = kappaquant.open_source(folder)
        made = Texts(source, yardstick, Path(work))
        bench = _Bench(source, yardstick, Path(work))
        rows: list[Row] = []
        for kind, of, tokens, several in (
            ("none", None, 0, 1),
            ("its own", made.own, FEWER, draws),
            ("its own", made.own, TOKENS, draws),
            ("of the training kind", made.of_the_kind, TOKENS, 1),
        ):
            for draw in range(several):
                text = of(tokens, draw) if of else None
                about_text = {"text": kind, "tokens": tokens, "draw": draw}
                for row in bench.rows(text, answers=draw == 0):
                    rows.append({**about_text, **row})
                    console.print(_line(rows[-1]), highlight=False, soft_wrap=True)
    return rounded(
        {
            "what": "reference model calibrated, held-out worked problems and prose; made by: "
            "python -m benchmarks.reference_calibrated",
            "environment": about, "sequences": len(yardstick.sequences), "tokens": yardstick.tokens, "problems": asked,
            "seconds": round(time.perf_counter() - start, 1), "rows": sorted(rows, key=lambda row: row["bits"]),
        }
    )  # fmt: skip


class _Bench:
    """What all rows share; the first ones, without text, are what the others are compared with."""

    def __init__(self, source: Any, yardstick: Yardstick, work: Path) -> None:
        self.source, self.yardstick, self.work = source, yardstick, work
        self.original = yardstick.answers({})
        self.without: dict[int, Reading] = {}

    def rows(self, text: Calibration | None, answers: bool) -> Iterator[Row]:
        for bits in BITS:
            plan = kappaquant.make_plan(self.source.tensors, self.source.config, "uniform", bits=bits)
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                packed = quantized(self.source, plan, Path(folder) / "packed", text)
            seconds = round(time.perf_counter() - begun, 1)
            weights = Weights.of(packed, self.source.tensors)
            reading = self.yardstick.read(weights.tensors)
            figures = reading.figures()
            figures["kld_nats"]["mean_error"] = clustered_mean(
                [float(k.sum()) for k in reading.kld], [len(k) for k in reading.kld]
            )[1]
            row = {"bits": bits, "bytes": weights.nbytes, "bits_per_weight": weights.bits_per_weight, **figures}
            if text:
                row["kld_less_without"] = asdict(kld_difference(reading, self.without[bits]))
            else:
                self.without[bits] = reading
            if answers:
                row["exact_match"] = answered(self.yardstick.answers(weights.tensors), self.original)
            yield {**row, "seconds_to_quantize": seconds}


def _line(row: Row) -> str:
    kld = row["kld_nats"]
    match = f"{row['exact_match']['correct']}/{row['exact_match']['of']}" if "exact_match" in row else ""
    return (
        f"{row['bits']} bits, text: {row['text']}, {row['tokens']} tokens, draw {row['draw']}: "
        f"KLD {kld['mean']:.6f} ± {kld['mean_error']:.6f}  {match}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=int, default=80, help="worked problems, and as many scenes of prose")
    parser.add_argument("--problems", type=int, default=300, help="questions for exact match")
    parser.add_argument("--draws", type=int, default=3, help="texts of its own, each sampled with another seed")
    args = parser.parse_args()
    # tensors this small gain nothing from more, and on a busy machine threads wait for each other
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = measure(args.model, args.texts, args.problems, args.draws, console := Console())
    console.print(f"{result['seconds']} s; {save('reference_calibrated', result)}", highlight=False)


if __name__ == "__main__":
    main()
