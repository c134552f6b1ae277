"""Encoding on one GPU: the CUDA kernel against the codec in torch on the same card, seconds for each GB of bf16 weights.

The weights, Gaussian, are in GPU memory already. A time includes the launch and the sums that come back to the host; each
is the median of several. Both give the same bytes, which is checked on every row.

python -m benchmarks.gpu_encode
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.kernels.cuda import encoder

ROWS, COLUMNS = 16384, 16384  # 0.54 GB
GROUP_SIZE = 128
REPEATS, CODEC_REPEATS = 9, 3


def seconds_per_gb(run: Callable[[], object], nbytes: int, repeats: int) -> float:
    """Median over some runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / nbytes * 1e9


def rows(weight: torch.Tensor) -> Iterator[dict[str, Any]]:
    """One row for each width and effort, and one for the errors at all widths, which a scan needs."""
    for bits in BITS:
        fmt = CodebookFormat(bits, GROUP_SIZE)
        for effort in EFFORTS:
            kernel, reference = encoder.encode(weight, fmt, effort), codec.encode(weight, fmt, effort)
            same = torch.equal(kernel.packed, reference.packed) and torch.equal(kernel.norms, reference.norms)
            del kernel, reference
            yield {
                "work": f"{bits} bits, {effort}",
                "same_bytes": same,
                "kernel": seconds_per_gb(lambda: encoder.encode(weight, fmt, effort), weight.nbytes, REPEATS),  # noqa: B023
                "codec": seconds_per_gb(lambda: codec.encode(weight, fmt, effort), weight.nbytes, CODEC_REPEATS),  # noqa: B023
            }
    yield {
        "work": "errors at 2 to 8 bits",
        "kernel": seconds_per_gb(lambda: encoder.squared_errors(weight, GROUP_SIZE), weight.nbytes, REPEATS),
        "codec": seconds_per_gb(lambda: codec.squared_errors(weight, GROUP_SIZE), weight.nbytes, CODEC_REPEATS),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    console, about = Console(), environment("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02, generator=generator)
    found = list(rows(weight))
    table = Table("seconds per GB", "kernel", "codec in torch")
    for row in found:
        table.add_row(row["work"], f"{row['kernel']:.5f}", f"{row['codec']:.4f}")
    console.print(table)
    if not all(row.get("same_bytes", True) for row in found):
        sys.exit("the kernel's bytes are not the codec's")
    result = {"environment": about, "group_size": GROUP_SIZE, "bytes": weight.nbytes, "repeats": REPEATS, "rows": found}
    console.print(f"written: {save('gpu_encode', result)}")


if __name__ == "__main__":
    main()
