"""The bootstrap over sequences: against scipy and analytic standard errors, repeatable; means by position."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import bootstrap

from kappaquant.evaluate.documents.evaluation import Measured
from kappaquant.evaluate.measures.bootstrap import Bootstrap, by_position
from kappaquant.evaluate.measures.intervals import clustered_mean


def test_bootstrap_against_scipy() -> None:
    rng = np.random.default_rng(1)
    values = [rng.exponential(rng.uniform(0.5, 2), rng.integers(10, 40)) for _ in range(60)]
    sums, counts = np.array([v.sum() for v in values]), np.array([len(v) for v in values])
    known = bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    found = Bootstrap(60, 20_000).mean(values)
    assert found.interval_95 == pytest.approx((known.low, known.high), abs=0.03 * (known.high - known.low))


def test_bootstrap_comes_to_the_analytic_standard_error() -> None:
    rng = np.random.default_rng(3)
    values = [rng.normal(rng.normal(5), 2, rng.integers(20, 60)) for _ in range(400)]
    found = Bootstrap(400, 4000).mean(values)
    mean, error = clustered_mean([v.sum() for v in values], [len(v) for v in values])
    assert found.value == pytest.approx(mean)
    assert found.interval_95 is not None
    low, high = found.interval_95
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.1 * error)
    naive = 1.96 * np.concatenate(values).std() / math.sqrt(sum(map(len, values)))
    assert (high - low) / 2 > 2 * naive  # tokens of a sequence resemble each other


def test_bootstrap_of_independent_tokens() -> None:
    values = list(np.random.default_rng(0).exponential(1, (900, 16)))
    found = Bootstrap(900, 4000).mean(values)
    assert found.interval_95 is not None
    half = (found.interval_95[1] - found.interval_95[0]) / 2
    assert half == pytest.approx(1.96 / math.sqrt(900 * 16), rel=0.08)


def test_bootstrap_is_repeatable_and_needs_two_sequences() -> None:
    values = [np.array([1.0, 2.0]), np.array([4.0])]
    assert Bootstrap(2, 200, 1).mean(values) == Bootstrap(2, 200, 1).mean(values)
    assert Bootstrap(1).mean(values[:1]) == Measured(1.5, None)
    perplexity = Bootstrap(2, 200).perplexity(values)
    assert perplexity.value == pytest.approx(math.exp(7 / 3))
    assert perplexity.interval_95 == pytest.approx((math.exp(1.5), math.exp(4)))


def test_positions_cover_every_token_once() -> None:
    klds = [np.arange(1, n + 1, dtype=float) for n in (1, 50, 255, 255)]
    bins = by_position(klds)
    assert [bins[0].first, bins[-1].last, len(bins)] == [1, 255, 8]
    assert all(one.last + 1 == after.first for one, after in pairwise(bins))
    assert [b.tokens for b in bins[:2]] == [4, 6]
    assert bins[0].mean == 1
    assert sum(b.mean * b.tokens for b in bins) == pytest.approx(sum(k.sum() for k in klds))
    assert [(b.first, b.last) for b in by_position([np.ones(1)])] == [(1, 1)]
