"""How sure a measurement is: intervals, standard errors and paired tests, in plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share of ``hits`` in ``n`` trials; (0, 1) for no trials."""
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits in {n} trials")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = hits / n, z * z / n
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def sign_test(first: int, second: int) -> float:
    """Two-sided exact p-value that ``first`` and ``second`` of their sum are two halves (McNemar's exact test).

    ``first`` counts the pairs that only one side got right, ``second`` those that only the other did.
    """
    n, fewer = first + second, min(first, second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def clustered_mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """(mean over all items, its standard error) where items come in clusters that resemble each other inside.

    The tokens of one text are no independent draws; whole texts are. The error is that of a ratio of sums over clusters
    (Cochran, Sampling Techniques, 1977, section 6.4); None for a single cluster.

    Args:
        sums: sum of each cluster's items.
        counts: number of each cluster's items.
    """
    total, clusters = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if clusters < 2:
        return mean, None
    residual = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(residual * clusters / (clusters - 1)) / total
