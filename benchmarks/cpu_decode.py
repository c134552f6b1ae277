"""kappaquant on CPUs beside llama.cpp: decoding and prompts, in turns in one process, and products alone beside torch.

Layers of Qwen3.6-35B-A3B's exact shape with random weights (a layer is what a model of so many more layers takes longer), SmolLM2-135M
from end to end, and products of one large matrix. Rows are medians over rounds, with the least and most of them. Bandwidth is that of
reading, the best of before, between and after the parts.

pip install --target llama llama-cpp-python
python -m benchmarks.cpu_decode --llama llama [--threads 16] [--parts layers small products] [--layers 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import cpu_models, cpu_products
from benchmarks.cpu_engines import about, take
from benchmarks.environment import environment, instruction_sets, save
from benchmarks.real_llamacpp import absent
from benchmarks.real_weights import default_folder, prepared
from kappaquant.kernels.cpu import library
from kappaquant.kernels.dispatch import kernels
from kappaquant.runtime.bench import read_bandwidth

Row = dict[str, Any]
PARTS = ("layers", "small", "products")


def measured(part: str, options: argparse.Namespace, work: Path) -> Iterator[Row]:
    """Rows of one of ``PARTS``."""
    patterns = options.only or ["*"]

    def wanted(names: Sequence[str]) -> list[str]:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

    if part == "layers":
        yield from cpu_models.layers(wanted(cpu_models.LAYERS), options.layers, options.threads, options.rounds, work)
    elif part == "small":
        names = wanted(cpu_models.SMALL)
        yield from cpu_models.small(names, options.folder, options.threads, options.rounds, work)
    else:
        yield from cpu_products.rows(options.rounds)


def with_shares(rows: list[Row], bandwidth: float) -> list[Row]:
    """Rows that read weights once, with their share of the bandwidth, in bytes per second."""
    return [
        row | {"of_bandwidth": round(1e9 * row["gb_per_s"] / bandwidth, 3)} if "gb_per_s" in row else row
        for row in rows
    ]


def table(rows: list[Row]) -> Table:
    """For the terminal."""
    made = Table("part", "what", "tokens", "ms", "least – most", "GB/s", "of bandwidth", "tok/s", "times faster than")
    for row in rows:
        name = row.get("model", row.get("what", ""))
        what = f"{name}, {row['what']}" if "model" in row and "what" in row else name
        if "absent" in row:
            made.add_row(row["part"], what, "", row["absent"])
            continue
        faster = ", ".join(f"{peer}: {ratio:.2f}" for peer, ratio in row["times_faster_than"].items())
        made.add_row(
            row["part"], what, str(row["tokens"]), f"{row['ms']:.3f}", f"{row['least_ms']:.3f} – {row['most_ms']:.3f}",
            str(row.get("gb_per_s", "")), f"{row['of_bandwidth']:.0%}" if "of_bandwidth" in row else "",
            str(row.get("tokens_per_s", "")), faster,
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="the folder that holds the package llama_cpp")
    parser.add_argument(
        "--threads", type=int, default=psutil.cpu_count(logical=False), help="default: the processor's cores"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=4, help="of the large shape, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where SmolLM2 is kept, or was put before")
    parser.add_argument("--only", nargs="+", help="names of models, or patterns, for want of memory or time")
    parser.add_argument(
        "--result",
        help="a name in benchmarks/results for what is measured; without it cpu_decode, if that is everything",
    )
    options = parser.parse_args()
    if options.layers < 4 or options.layers % 4 or min(options.threads, options.rounds) < 1:
        parser.error("--layers must be a multiple of 4, --threads and --rounds at least 1")
    options.folder = options.folder or default_folder(None)
    if options.llama:
        take(options.llama)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    about_machine = {**environment(), "threads": options.threads, "instruction_sets": instruction_sets()}
    if "small" in options.parts:
        prepared(options.folder)
    rates = [read_bandwidth("cpu")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="kappaquant-cpu-") as work:
        for part in options.parts:
            for row in measured(part, options, Path(work)):
                rows.append(row)
                print(*row.values(), file=sys.stderr, flush=True)  # a long run shows where it is
            rates.append(read_bandwidth("cpu"))
    bandwidth = max(rates)
    rows = with_shares(rows, bandwidth)
    console = Console(width=170)
    console.print(table(rows))
    result = {
        "environment": about_machine, "native_core": library.absence() or library.core().name,
        "kernels": [kernel.name for kernel in kernels()],
        "llama.cpp": {"absent": absent()} if absent() else about(), "rounds": options.rounds,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "read_gb_per_s_at_times": [round(rate / 1e9, 2) for rate in rates], "rows": rows,
    }  # fmt: skip
    if not options.result and (options.only or set(options.parts) != set(PARTS)):
        console.print("not everything was measured, so nothing is written without --result")
    else:
        console.print(f"written: {save(options.result or 'cpu_decode', result)}")


if __name__ == "__main__":
    main()
