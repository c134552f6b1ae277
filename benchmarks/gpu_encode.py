"""Encoding on one GPU: the CUDA kernels against the codec in torch on the same card, seconds for each GB of bf16 weights.

The weights, Gaussian, are in GPU memory already. A time includes the launch and the sums that come back to the host; each
is the median of several. Both give the same bytes, which is checked on every row. Of trellis codes the codec, which takes
seconds, is given a part of the rows.

python -m benchmarks.gpu_encode
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.environment import environment, save
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels.cuda import encoder, trellis_encoder

ROWS, COLUMNS = 16384, 16384  # 0.54 GB
TRELLIS_ROWS = 1024  # for the codec
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


def row(
    work: str,
    kernel: Callable[[Tensor], codec.CodebookEncoded],
    fmt: GroupedFormat,
    effort: Effort,
    weight: Tensor,
    part: Tensor,
) -> dict[str, Any]:
    """Times of a kernel with a weight, and of the codec with a part of its rows."""
    found, known = kernel(part), codec.encode(part, fmt, effort)
    same = torch.equal(found.packed, known.packed) and torch.equal(found.norms, known.norms)
    del found, known
    return {
        "work": work,
        "same_bytes": same,
        "kernel": seconds_per_gb(lambda: kernel(weight), weight.nbytes, REPEATS),
        "codec": seconds_per_gb(lambda: codec.encode(part, fmt, effort), part.nbytes, CODEC_REPEATS),
    }


def rows(weight: Tensor) -> Iterator[dict[str, Any]]:
    """One row for each format and effort, and one for the errors at all widths, which a scan needs."""
    for bits in BITS:
        fmt = CodebookFormat(bits, GROUP_SIZE)
        for effort in EFFORTS:
            yield row(
                f"{bits} bits, {effort}", partial(encoder.encode, fmt=fmt, effort=effort), fmt, effort, weight, weight
            )
    for bits in TRELLIS_BITS:
        trellis = TrellisFormat(bits, GROUP_SIZE)
        for effort in EFFORTS:
            kernel = partial(trellis_encoder.encode, fmt=trellis, effort=effort)
            yield row(f"{trellis.id}, {effort}", kernel, trellis, effort, weight, weight[:TRELLIS_ROWS])
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
