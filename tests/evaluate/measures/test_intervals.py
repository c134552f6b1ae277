"""Tests and intervals of paired outcomes: those of scipy and statsmodels, and as often right as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from kappaquant.evaluate.measures.intervals import paired_difference, sign_test, wilson

TABLES = [(0, 0, 10), (1, 0, 10), (4, 0, 200), (8, 3, 60), (3, 8, 60), (31, 0, 60), (12, 9, 1319), (10, 0, 10)]


@pytest.mark.parametrize(("first", "second", "n"), TABLES)
def test_mcnemar_against_scipy_and_statsmodels(first: int, second: int, n: int) -> None:
    known = mcnemar([[n - first - second, first], [second, 0]], exact=True).pvalue if first + second else 1.0
    assert sign_test(first, second) == pytest.approx(known, rel=1e-9)
    if first + second:
        assert sign_test(first, second) == pytest.approx(binomtest(first, first + second).pvalue, rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (179, 200), (1, 3)])
def test_wilson_against_statsmodels(hits: int, n: int) -> None:
    assert wilson(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


def _score_by_search(first: int, second: int, n: int, difference: float) -> float:
    """Tango's statistic with the likeliest nuisance parameter found by scipy's search instead of its closed form."""
    same = n - first - second

    def unlikely(p: float) -> float:
        parts = ((second, p), (first, p + difference), (same, 1 - 2 * p - difference))
        return -sum(count * np.log(max(share, 1e-300)) for count, share in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    p = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (first - second - n * difference) / np.sqrt(n * (2 * p + difference - difference**2))


@pytest.mark.parametrize(("first", "second", "n"), [(8, 3, 60), (3, 8, 60), (4, 1, 200), (12, 9, 1319), (25, 7, 90)])
def test_the_interval_of_a_difference_against_a_search(first: int, second: int, n: int) -> None:
    z, middle = norm.ppf(0.975), (first - second) / n
    low = brentq(lambda d: _score_by_search(first, second, n, d) - z, -0.9, middle)
    high = brentq(lambda d: _score_by_search(first, second, n, d) + z, middle, 0.9)
    assert paired_difference(first, second, n) == pytest.approx((low, high), abs=1e-5)


def test_the_interval_leaves_out_zero_where_mcnemar_without_correction_is_significant() -> None:
    for first in range(14):
        for second in range(14):
            low, high = paired_difference(first, second, 40)
            assert low <= (first - second) / 40 <= high
            assert (-high, -low) == pytest.approx(paired_difference(second, first, 40), abs=1e-9)
            if first + second:
                known = mcnemar([[1, first], [second, 1]], exact=False, correction=False).pvalue
                assert (known < 0.05) == (not low <= 0 <= high)
    assert paired_difference(0, 0, 60) == pytest.approx((-0.0602, 0.0602), abs=1e-4)  # z² / (n + z²)
    ratio = norm.ppf(0.975) ** 2 / 6  # all apart: (n - nd)² / (n (1 - d²)) = z², solved by hand
    assert paired_difference(6, 0, 6) == pytest.approx(((1 - ratio) / (1 + ratio), 1), abs=1e-6)
    with pytest.raises(ValueError, match="of 3 pairs"):
        paired_difference(2, 2, 3)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for first, second, _ in rng.multinomial(80, [0.12, 0.05, 0.83], size=2000):
        low, high = paired_difference(int(first), int(second), 80)
        held += low <= 0.07 <= high
    assert 0.93 < held / 2000 < 0.97
