"""How sure a measurement is: intervals, standard errors and paired tests, in plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def paired_difference(first: int, second: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval (1998) for the difference of two shares measured on the same ``n`` questions.

    ``first`` counts the questions that only one side got right, ``second`` those that only the other did; the difference is
    (first - second) / n. The interval leaves out 0 just where McNemar's test without continuity correction is significant,
    and has a width even where the sides never differ.
    """
    if min(first, second) < 0 or first + second > n or n < 1:
        raise ValueError(f"{first} and {second} of {n} pairs")
    z = NormalDist().inv_cdf(0.5 + level / 2)

    def score(difference: float) -> float:
        """Standard score of what was seen, were this the true difference (Tango, Statistics in Medicine 17, 891-908)."""
        b = (2 * n - first + second) * difference - first - second
        c = -second * difference * (1 - difference)
        only_second = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)  # likeliest under the difference
        variance = n * (2 * only_second + difference * (1 - difference))
        away = first - second - n * difference
        return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away)

    middle = (first - second) / n
    return _crossing(score, z, -1.0, middle), _crossing(score, -z, middle, 1.0)


def _crossing(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function comes to ``level``, by halving; the end nearest to it if it does not."""
    if low == high:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


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
