"""Compute the converged Lloyd-Max codebooks of a unit Gaussian and write them to ``kappaquant/formats/codebooks.json``.

A Lloyd-Max quantizer satisfies two conditions at once (Lloyd 1982, Max 1960): each boundary is the midpoint of its
neighbouring centroids, and each centroid is the conditional mean of the density between its boundaries,

    c_i = (phi(b_i) - phi(b_{i+1})) / (Phi(b_{i+1}) - Phi(b_i)).

The plain fixed-point iteration creeps at 8 bits, so the equations are solved by Newton's method on the symmetric half
(a tridiagonal system), started from the high-resolution density ~ N(0, 3) of optimal centroids.

    python scripts/make_codebooks.py            # rewrites the "gaussian" entry, leaves the others as they are
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from statistics import NormalDist

PATH = Path(__file__).parent.parent / "kappaquant" / "formats" / "codebooks.json"
NORMAL = NormalDist()


def interval_mean(lo: float, hi: float) -> tuple[float, float]:
    """Mean and probability of a unit Gaussian restricted to [lo, hi], 0 <= lo < hi <= inf."""
    mass = 0.5 * (math.erfc(lo / math.sqrt(2)) - (0.0 if math.isinf(hi) else math.erfc(hi / math.sqrt(2))))
    return (NORMAL.pdf(lo) - (0.0 if math.isinf(hi) else NORMAL.pdf(hi))) / mass, mass


def residual(half: list[float]) -> list[float]:
    edges = [0.0] + [(a + b) / 2 for a, b in itertools.pairwise(half)] + [math.inf]
    return [c - interval_mean(edges[i], edges[i + 1])[0] for i, c in enumerate(half)]


def lloyd_max(bits: int, tolerance: float = 1e-14) -> list[float]:
    """Positive half of the converged codebook with 2**bits levels for a unit Gaussian, ascending."""
    n = 2 ** (bits - 1)
    half = [math.sqrt(3) * NORMAL.inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)]
    for _ in range(200):
        edges = [0.0] + [(a + b) / 2 for a, b in itertools.pairwise(half)] + [math.inf]
        lower, diagonal, upper, right = [], [], [], []
        for i, c in enumerate(half):
            lo, hi = edges[i], edges[i + 1]
            mean, mass = interval_mean(lo, hi)
            # d mean / d edge = pdf(edge) * |mean - edge| / mass; each inner edge moves by half of either neighbour.
            from_lo = 0.5 * NORMAL.pdf(lo) * (mean - lo) / mass if i else 0.0
            from_hi = 0.0 if math.isinf(hi) else 0.5 * NORMAL.pdf(hi) * (hi - mean) / mass
            lower.append(-from_lo)
            diagonal.append(1 - from_lo - from_hi)
            upper.append(-from_hi)
            right.append(c - mean)
        for i in range(1, n):
            factor = lower[i] / diagonal[i - 1]
            diagonal[i] -= factor * upper[i - 1]
            right[i] -= factor * right[i - 1]
        step = [0.0] * n
        for i in reversed(range(n)):
            step[i] = (right[i] - (upper[i] * step[i + 1] if i + 1 < n else 0.0)) / diagonal[i]
        damping = 1.0
        while True:
            trial = [c - damping * s for c, s in zip(half, step, strict=True)]
            if trial[0] > 0 and all(a < b for a, b in itertools.pairwise(trial)):
                break
            damping /= 2
        half = trial
        if max(map(abs, step)) < tolerance:
            break
    assert max(map(abs, residual(half))) < 1e-12, f"{bits} bits did not converge"
    return half


def main() -> None:
    books = json.loads(PATH.read_text()) if PATH.exists() else {}
    books["gaussian"] = {str(bits): lloyd_max(bits) for bits in range(2, 9)}
    PATH.write_text(json.dumps(books, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
