"""Relative squared error of the codec on Gaussian weights, per width and effort, against the bounds it must keep.

python -m benchmarks.codec_error
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, save
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat

GROUP_SIZE = 128
BOUNDS = {3: 0.0320, 4: 0.0080, 5: 0.0020}  # of effort "best"
TRELLIS_BOUNDS = {2: 0.0815, 3: 0.0230, 4: 0.0060}


def measure(fmt: GroupedFormat, effort: Effort, rows: int, seed: int = 0) -> dict[str, float]:
    """Error of weights decoded from what is stored, and seconds per GB of the same weights in bf16 on one thread."""
    weight = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(seed))
    codec.encode(weight[:64], fmt, effort)  # builds the tables
    start = time.perf_counter()
    encoded = codec.encode(weight, fmt, effort)
    seconds = time.perf_counter() - start
    error = (codec.decode(encoded.packed, encoded.norms, fmt, weight.shape[-1]) - weight).double().square().sum()
    return {
        "relative_mse": float(f"{(error / weight.double().square().sum()).item():.5g}"),
        "seconds_per_gb": round(seconds / (2 * weight.numel() / 1e9), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of 2048 Gaussian weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = environment()
    table = Table(
        "format", "bits/weight", "fast", "best", "bound (best)", "fast s/GB", "best s/GB", title="relative MSE"
    )
    results, missed = [], []
    kinds: list[tuple[GroupedFormat, float | None]] = [
        *((CodebookFormat(bits, GROUP_SIZE), BOUNDS.get(bits)) for bits in BITS),
        *((TrellisFormat(bits, GROUP_SIZE), TRELLIS_BOUNDS[bits]) for bits in TRELLIS_BITS),
    ]
    for fmt, bound in kinds:
        fast, best = (measure(fmt, effort, args.rows) for effort in EFFORTS)
        if bound is not None and best["relative_mse"] > bound:
            missed.append(f"{fmt.id}: {best['relative_mse']} is above {bound}")
        bits_per_weight = 8 * fmt.bytes_per_group / GROUP_SIZE + 16 / GROUP_SIZE
        results.append(
            {"format": fmt.id, "bits": fmt.bits, "bits_per_weight": bits_per_weight, "bound": bound, "fast": fast, "best": best}
        )  # fmt: skip
        table.add_row(
            fmt.id, f"{bits_per_weight:.3f}", f"{fast['relative_mse']:.5f}", f"{best['relative_mse']:.5f}",
            "" if bound is None else f"{bound:.4f}", f"{fast['seconds_per_gb']}", f"{best['seconds_per_gb']}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    what = "Gaussian weights, float16 norms; seconds on one thread per GB of the same weights in bf16"
    result = {"what": what, "weights": args.rows * 2048, "group_size": GROUP_SIZE, "results": results}
    console.print(f"written: {save('codec_error', {'environment': about, **result})}")
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
