"""Intervals by resampling whole sequences, whose tokens resemble each other, and the figures of a report made with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from kappaquant.evaluate.documents.evaluation import DivergenceReport, Interval, Measured, PositionBin

Values = Sequence[np.ndarray]  # of every sequence, one value for each predicted token
_BINS = 8
_BLOCK = 1 << 22  # draws held at a time


class Bootstrap:
    """The same draws of sequences for every figure of a report, so that figures of one text move together.

    Args:
        sequences: how many there are; of fewer than 2 no interval is known.
        resamples: draws of as many sequences, with replacement.
        seed: of numpy's default generator.
    """

    def __init__(self, sequences: int, resamples: int = 2000, seed: int = 0) -> None:
        self.sequences, self.resamples, self.seed = sequences, resamples, seed

    def mean(self, values: Values) -> Measured:
        """Mean over tokens, with the percentile interval (Efron 1979) of the ratio of sums over resampled sequences."""
        sums = np.array([v.sum(dtype=np.float64) for v in values])
        counts = np.array([len(v) for v in values], np.float64)
        value = float(sums.sum() / counts.sum())
        if self.sequences < 2:
            return Measured(value, None)
        rng = np.random.default_rng(self.seed)
        rows = max(1, _BLOCK // self.sequences)
        means = []
        for start in range(0, self.resamples, rows):
            size = (min(rows, self.resamples - start), self.sequences)
            drawn = rng.integers(self.sequences, size=size)
            means.append(sums[drawn].sum(-1) / counts[drawn].sum(-1))
        low, high = np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()
        return Measured(value, (low, high))

    def perplexity(self, losses: Values) -> Measured:
        """exp of the mean negative log-likelihood and of the ends of its interval."""
        nll = self.mean(losses)
        return Measured(math.exp(nll.value), _map_exp(nll.interval_95))

    def divergence(self, klds: Values, agreed: Values) -> DivergenceReport:
        """All figures of a divergence.

        Args:
            klds: nats of every token; agreed: 1 where both think the same next token likeliest, else 0.
        """
        mean, agreement = self.mean(klds), self.mean(agreed)
        every = np.concatenate(klds).astype(np.float64)
        median, p99 = np.quantile(every, [0.5, 0.99]).tolist()
        return DivergenceReport(
            mean.value, mean.interval_95, median, p99, float(every.max()), agreement.value, agreement.interval_95,
            by_position(klds),
        )  # fmt: skip


def by_position(klds: Values) -> tuple[PositionBin, ...]:
    """Means over at most 8 bins of context length, each about as many times longer than the one before."""
    longest = max(map(len, klds))
    edges = np.unique(np.geomspace(1, longest + 1, _BINS + 1).round().astype(int)).tolist()
    bins = []
    for first, after in pairwise(edges):
        inside = np.concatenate([k[first - 1 : after - 1] for k in klds]).astype(np.float64)
        bins.append(PositionBin(first, after - 1, float(inside.mean()), len(inside)))
    return tuple(bins)


def _map_exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
