"""Encoding on one core: the native core against the codec in torch, seconds for each GB of bf16 weights, in the same run.

Of trellis codes, whose search torch takes minutes for, a small part of the weights is encoded, fewer times.
Both take turns over many short repetitions, of which the fastest counts: others' work on the machine then adds little to either.
Both give the same bytes, which is checked for every row.

python -m benchmarks.cpu_encode
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels.cpu import encoder, library

ROWS, COLUMNS = 256, 2048  # 1 MB: 1 to 25 ms a repetition
TRELLIS_SHARE = 16  # one row of so many, and one repetition
GROUP_SIZE = 128


def seconds_per_gb(runs: Mapping[str, Callable[[], object]], nbytes: int, repeats: int) -> dict[str, float]:
    """The fastest repetition of each, after one to warm up; one after another, round by round."""
    for run in runs.values():
        run()
    fastest = dict.fromkeys(runs, math.inf)
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {name: round(seconds / nbytes * 1e9, 3) for name, seconds in fastest.items()}


def rows(weight: torch.Tensor, level: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each width and effort, and one for the errors at all widths, which a scan needs."""
    codebooks = [(CodebookFormat(bits, GROUP_SIZE), f"{bits} bits", 1) for bits in BITS]
    trellises = [(TrellisFormat(bits, GROUP_SIZE), f"trellis, {bits} bits", TRELLIS_SHARE) for bits in TRELLIS_BITS]
    for fmt, label, share in (*codebooks, *trellises):
        some = weight[::share].contiguous()
        for effort in EFFORTS:
            native, reference = encoder.encode(some, fmt, effort, level=level), codec.encode(some, fmt, effort)
            same = torch.equal(native.packed, reference.packed) and torch.equal(native.norms, reference.norms)
            runs = {
                "native": lambda: encoder.encode(some, fmt, effort, level=level),  # noqa: B023
                "codec": lambda: codec.encode(some, fmt, effort),  # noqa: B023
            }
            yield {
                "work": f"{label}, {effort}",
                "same_bytes": same,
                **seconds_per_gb(runs, some.nbytes, -(-repeats // share)),
            }
    native_errors, errors = encoder.squared_errors(weight, GROUP_SIZE), codec.squared_errors(weight, GROUP_SIZE)
    scans = {
        "native": lambda: encoder.squared_errors(weight, GROUP_SIZE, level=level),
        "codec": lambda: codec.squared_errors(weight, GROUP_SIZE),
    }
    yield {
        "work": "errors at 2 to 8 bits",
        "same_bytes": native_errors == errors,
        **seconds_per_gb(scans, weight.nbytes, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=60)
    args = parser.parse_args()
    if reason := library.absence():
        sys.exit(reason)
    torch.set_num_threads(1)
    console, about, level = Console(), environment(), library.core().name
    weight = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16).normal_(
        0, 0.02, generator=torch.Generator().manual_seed(0)
    )
    found = list(rows(weight, level, args.repeat))
    table = Table("seconds per GB, one core", f"native, {level}", "codec in torch", "times")
    for row in found:
        table.add_row(row["work"], f"{row['native']:.2f}", f"{row['codec']:.1f}", f"{row['codec'] / row['native']:.0f}")
    console.print(table)
    if not all(row["same_bytes"] for row in found):
        sys.exit("the native core's bytes are not the codec's")
    what = f"encoding Gaussian bf16 weights [{ROWS}, {COLUMNS}], groups of {GROUP_SIZE}, one thread, fastest of {args.repeat} repetitions"
    result = {
        "environment": about,
        "what": what,
        "level": level,
        "unit": "seconds per GB of bf16 weights",
        "rows": found,
    }
    console.print(f"written: {save('cpu_encode', result)}")


if __name__ == "__main__":
    main()
