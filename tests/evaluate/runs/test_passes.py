"""Passes over a text: the batches of the second are none of the first."""

from __future__ import annotations

from kappaquant.evaluate.runs.passes import Passes


def test_other_batches_are_others() -> None:
    sequences = [[1, 2], [1, 2, 3], [1, 2, 3]]
    assert Passes(sequences, [[0, 1], [2]], print).other_batches == [[0], [1], [2]]
    assert Passes(sequences, [[0], [1], [2]], print).other_batches == [[0, 1], [2, 0]]
    assert Passes(sequences[:1], [[0]], print).other_batches == [[0, 0]]
