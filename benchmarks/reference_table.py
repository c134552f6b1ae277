"""The reference model in every plan and by other quantizers: bytes, divergence, answers; and plans of equal bytes compared.

python -m benchmarks.reference_table [--texts 80] [--problems 300] [--seeds 10]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor

import kappaquant
from benchmarks.environment import ROOT, environment, save
from benchmarks.reference_ablation import Deciding, equal_bytes
from benchmarks.reference_measure import Reading, Yardstick, answered, kld_difference, spread
from benchmarks.reference_peers import PEERS, Peer, Weights, round_to_nearest
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.evaluate.documents.report import rounded
from kappaquant.files.safetensors import TensorInfo
from kappaquant.planning import profile as scanner
from kappaquant.planning.plan import KEPT, Plan
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.sources.source import Source

MODEL = ROOT / "reference" / "model"
OWN: dict[str, dict[str, Any]] = {
    "uniform 3": {"policy": "uniform", "bits": 3},
    "apex": {"policy": "recipe", "recipe": "apex"},
    "apex2": {"policy": "recipe", "recipe": "apex2"},
    "uniform 4": {"policy": "uniform", "bits": 4},
    "kurtosis": {"policy": "kurtosis"},
    "apex3": {"policy": "recipe", "recipe": "apex3"},
}
RECIPES = ("apex", "apex2", "apex3")
Row = dict[str, Any]


class Bench:
    """What all rows share: the source, its κ, the yardstick, and one checkpoint per plan."""

    def __init__(self, folder: Path, work: Path, texts: int, asked: int) -> None:
        self.folder, self.work = folder, work
        self.source: Source = kappaquant.open_source(folder)
        self.infos: Mapping[str, TensorInfo] = self.source.tensors
        self.kappa = {name: k for name, k in scanner.scan(self.source, jobs=1).kurtosis().items() if k is not None}
        self.yardstick = Yardstick(folder, texts, asked)
        self.original = self.yardstick.answers({})

    def plan(self, **options: Any) -> Plan:
        """A plan of the source."""
        return kappaquant.make_plan(self.infos, self.source.config, profile=self.kappa, **options)

    def checkpoint(self, name: str, plan: Plan) -> dict[str, tuple[Tensor, int]]:
        """See ``quantized``."""
        return quantized(self.source, plan, self.work / name)

    def source_tensors(self) -> dict[str, Tensor]:
        """The source's weights, by name."""
        from safetensors.torch import load_file

        return load_file(self.folder / "model.safetensors")

    def row(self, name: str, group: str, packed: Mapping[str, tuple[Tensor, int]], setting: str) -> Row:
        """Measure one variant."""
        weights = Weights.of(packed, self.infos)
        figures = self.yardstick.read(weights.tensors).figures()
        match = answered(self.yardstick.answers(weights.tensors), self.original)
        return {
            "name": name, "group": group, "setting": setting, "bytes": weights.nbytes,
            "bits_per_weight": weights.bits_per_weight, "share_quantized": weights.quantized / weights.weights,
            **figures, "exact_match": match,
        }  # fmt: skip


def quantized(
    source: Source, plan: Plan, folder: Path, calibration: Calibration | None = None, device: str | None = None
) -> dict[str, tuple[Tensor, int]]:
    """Quantize as the command does, and read back: name -> (dequantized, bytes) of the quantized tensors."""
    kappaquant.quantize(source, folder, plan, kappaquant.Options(device=device), calibration=calibration)
    checkpoint = open_checkpoint(folder)
    packed = [tensor for tensor in checkpoint.keys() if checkpoint.format_of(tensor) is not None]
    return {tensor: (checkpoint.dequantize(tensor), checkpoint.nbytes(tensor)) for tensor in packed}


def formats_of(plan: Plan) -> dict[str, str | None]:
    """Format id of each tensor, None for one that is kept."""
    return {name: None if choice.format == KEPT else choice.format for name, choice in plan.choices.items()}


def own_rows(bench: Bench) -> Iterator[Row]:
    """The plans of this project."""
    for name, options in OWN.items():
        yield bench.row(name, "kappaquant", bench.checkpoint(name, bench.plan(**options)), str(options))


def rounding_rows(bench: Bench) -> Iterator[Row]:
    """Round to nearest of exactly the tensors that the uniform plans quantize."""
    tensors = bench.source_tensors()
    plan = bench.plan(policy="uniform", bits=3)
    for bits in (3, 4):
        packed = {n: round_to_nearest(tensors[n], bits) for n, choice in plan.choices.items() if choice.format != KEPT}
        setting = f"round to nearest, groups of 128, float16 scale and {bits}-bit zero point"
        yield bench.row(f"RTN int{bits} g128", "rounding", packed, setting)


def peer_rows(bench: Bench, peer: Peer) -> Iterator[Row]:
    """A peer as a user gets it, and with the fused experts too; one row that says so if it is not installed."""
    if peer.version is None:
        yield {"name": peer.name, "group": "peer", "setting": peer.setting, "absent": f"{peer.package} not installed"}
        return
    packed = peer.as_loaded(bench.folder)
    setting = f"{peer.setting}; {peer.package} {peer.version}"
    yield bench.row(peer.name, "peer", packed, setting)
    experts = peer.experts(bench.source_tensors())
    yield bench.row(f"{peer.name} + experts", "peer with experts", {**packed, **experts}, setting)


class Ablation:
    """Plans of equal bytes: by κ, by role, and with κ dealt out at random."""

    def __init__(self, bench: Bench, seeds: int) -> None:
        self.bench, self.seeds = bench, seeds
        base = bench.plan(policy="uniform", bits=3)
        self.deciding = Deciding(base, bench.infos, bench.source.config, bench.kappa)
        self._by_bits = {
            bits: bench.checkpoint(f"all {bits}", bench.plan(policy="uniform", bits=bits)) for bits in (3, 4, 5)
        }

    def at(self, name: str, recipe: Plan | None, budget: int) -> Row:
        """KLD of every assignment that takes ``budget`` bytes; ``recipe`` is one of them, or None."""
        by_kappa = self.deciding.by_kappa(budget)
        dealt = [self.deciding.at_random(budget, seed) for seed in range(self.seeds)]
        plans = [by_kappa, *dealt, *([recipe] if recipe else [])]
        sizes = [self.deciding.nbytes(plan) for plan in plans]
        if not equal_bytes(sizes, budget):
            raise SystemExit(f"{name}: plans of {min(sizes)} to {max(sizes)} bytes are not equal to {budget}")
        kappa, randoms = self._read(by_kappa), [self._read(plan) for plan in dealt]
        role = self._read(recipe) if recipe else None
        row: Row = {"size_of": name, "bytes": budget, "bytes_least": min(sizes), "bytes_most": max(sizes)}
        row["kappa"] = self._entry(kappa)
        row["random"] = [self._entry(reading) for reading in randoms]
        means = [entry["mean"] for entry in row["random"]]
        row["random_spread"] = spread(means)
        row["kappa_beats_random"] = sum(row["kappa"]["mean"] < mean for mean in means)
        row["kappa_less_random"] = self._less_all(kappa, randoms)
        if role:
            row["role"] = self._entry(role)
            row["role_beats_random"] = sum(row["role"]["mean"] < mean for mean in means)
            row["kappa_less_role"] = asdict(kld_difference(kappa, role))
            row["role_less_random"] = self._less_all(role, randoms)
        return row

    def rows(self) -> Iterator[Row]:
        """One for the size of each recipe, and one for that of the kurtosis policy."""
        for name in RECIPES:
            plan = self.bench.plan(policy="recipe", recipe=name)
            yield self.at(name, plan, self.deciding.nbytes(plan))
        yield self.at("kurtosis", None, self.deciding.nbytes(self.bench.plan(policy="kurtosis")))

    def _read(self, plan: Plan) -> Reading:
        bits = {name: plan.bits(name) for name, choice in plan.choices.items() if choice.format != KEPT}
        return self.bench.yardstick.read({name: self._by_bits[b][name][0] for name, b in bits.items()})

    @staticmethod
    def _entry(reading: Reading) -> dict[str, Any]:
        kld = reading.figures()["kld_nats"]
        return {key: kld[key] for key in ("mean", "interval_95", "top1_agreement")}

    @staticmethod
    def _less_all(one: Reading, others: list[Reading]) -> dict[str, Any]:
        """Mean KLD less the mean over the random plans, token by token; the interval is that of the text."""
        klds = [np.mean(same, axis=0) for same in zip(*(other.kld for other in others), strict=True)]
        average = Reading(klds, one.agreed, one.loss)
        return asdict(kld_difference(one, average))


def measure(folder: Path, texts: int, asked: int, seeds: int, console: Console) -> dict[str, Any]:
    """The whole table, as JSON values."""
    start, about = time.perf_counter(), environment()
    about["peers"] = {peer.package: peer.version for peer in PEERS}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(folder, Path(work), texts, asked)
        original = bench.row("bf16", "original", {}, "the source")
        rows = [original]
        for made in (own_rows(bench), rounding_rows(bench), *(peer_rows(bench, peer) for peer in PEERS)):
            for row in made:
                console.print(_line(row), highlight=False, soft_wrap=True)
                rows.append(row)
        ablation = []
        for row in Ablation(bench, seeds).rows():
            console.print(_ablation_line(row), highlight=False, soft_wrap=True)
            ablation.append(row)
        floor = _bf16_arithmetic(bench)
    return rounded(
        {
            "what": "reference model, held-out worked problems and prose; made by: python -m benchmarks.reference_table",
            "environment": about, "sequences": len(bench.yardstick.sequences), "tokens": bench.yardstick.tokens,
            "problems": asked, "seconds": round(time.perf_counter() - start, 1), "bf16_arithmetic": floor,
            "rows": rows, "ablation": ablation,
        }
    )  # fmt: skip


def _bf16_arithmetic(bench: Bench) -> dict[str, Any]:
    """KLD of the original computed in bf16 from itself in float32: what rounding in between alone does."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.bfloat16).eval()
    found: dict[str, Any] = bench.yardstick.read({}, model).figures()["kld_nats"]
    return found


def _line(row: Row) -> str:
    if "absent" in row:
        return f"{row['name']:28} {row['absent']}"
    match = row["exact_match"]
    return (
        f"{row['name']:28} {row['bytes']:>10,} B {row['bits_per_weight']:6.2f} bits  KLD {row['kld_nats']['mean']:.6f}  "
        f"{match['correct']}/{match['of']}"
    )


def _ablation_line(row: Row) -> str:
    role = f"{row['role']['mean']:.6f}" if "role" in row else "–"
    dealt = row["random_spread"]
    return (
        f"at the bytes of {row['size_of']:9} κ {row['kappa']['mean']:.6f}  by role {role}  "
        f"random {dealt['mean']:.6f} ({dealt['least']:.6f} to {dealt['most']:.6f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=int, default=80, help="worked problems, and as many scenes of prose")
    parser.add_argument("--problems", type=int, default=300, help="questions for exact match")
    parser.add_argument("--seeds", type=int, default=10, help="random assignments in the ablation")
    args = parser.parse_args()
    torch.set_num_threads(
        1
    )  # tensors this small gain nothing from more, and on a busy machine threads wait for each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    result = measure(args.model, args.texts, args.problems, args.seeds, console)
    console.print(f"{result['seconds']} s; {save('reference_table', result)}", highlight=False)


if __name__ == "__main__":
    main()
