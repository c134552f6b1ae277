"""Train the levels of the trellis formats for a unit Gaussian and write them to ``kappaquant/formats/codebooks.json``.

Lloyd's iteration with the package's own search: each round takes fresh groups of 128 of one norm, encodes them as effort "fast" does, and moves every
level to the mean of what it stands for. Once the levels have settled, sums run on over rounds, so that the noise of a round averages
out, until no level changes by more than ``TOLERANCE``.

    python scripts/make_trellis_levels.py            # rewrites the "trellis" entry, leaves the others as they are; minutes on one core
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from kappaquant.formats.codebook import symmetric
from kappaquant.formats.trellis import TRELLIS_BITS
from kappaquant.formats.viterbi import RingRounding

PATH = Path(__file__).parent.parent / "kappaquant" / "formats" / "codebooks.json"
GROUP = 128
GROUPS = 4096  # of a round
SETTLING, MOST = 60, 600  # rounds
TOLERANCE = 5e-5  # of a level, for weights of variance 1


def first_levels(bits: int) -> list[float]:
    """The positive half of levels nearly as dense as optimal quantizers of many levels have them."""
    count = 2 ** (bits + 1)
    shares = (torch.arange(count // 2, dtype=torch.float64) + 0.5) / count + 0.5
    return (math.sqrt(3) * 0.8 * torch.special.ndtri(shares)).tolist()


def round_of(half: list[float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(sums of weights, their numbers), float64 by magnitude of the level, over fresh groups."""
    levels = tuple(level / math.sqrt(GROUP) for level in symmetric(half))
    y = torch.randn(GROUP, GROUPS, generator=generator)
    y /= y.square().sum(0).sqrt()
    rounding = RingRounding(GROUP, GROUPS, y.device, levels)
    rounding.choose(y)
    codes, count = rounding.codes.flatten().long(), len(half)
    negative = codes < count
    magnitude = torch.where(negative, count - 1 - codes, codes - count)
    sums = torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, magnitude, torch.where(negative, -y.flatten(), y.flatten()).double())
    return sums * math.sqrt(GROUP), magnitude.bincount(minlength=count).double()


def trained(bits: int) -> list[float]:
    """Positive half of the converged levels, ascending."""
    generator = torch.Generator().manual_seed(bits)
    half = first_levels(bits)
    sums = numbers = torch.zeros(len(half), dtype=torch.float64)
    for number in range(MOST):
        new = round_of(half, generator)
        sums, numbers = (sums + new[0], numbers + new[1]) if number >= SETTLING else new
        found = (sums / numbers).sort()[0].tolist()
        change = max(abs(a - b) for a, b in zip(found, half, strict=True))
        half = found
        if number >= 2 * SETTLING and change < TOLERANCE:
            print(f"{bits} bits: converged in {number} rounds", flush=True)
            return half
    raise SystemExit(f"{bits} bits did not converge: a level still changes by {change:.2g}")


def main() -> None:
    books = json.loads(PATH.read_text(encoding="utf-8"))
    books["trellis"] = {str(bits): [round(level, 6) for level in trained(bits)] for bits in TRELLIS_BITS}
    PATH.write_text(json.dumps(books, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
