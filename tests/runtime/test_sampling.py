"""Draws follow the distribution that the options leave, row by row, and are repeatable."""

from __future__ import annotations

import pytest
import torch

from kappaquant.runtime.sampling import Sampler, Sampling

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
DRAWS = 20_000


def shares(options: Sampling) -> torch.Tensor:
    """How often each token is drawn."""
    logits = PROBABILITIES.log().expand(DRAWS, -1)
    drawn = Sampler(options, torch.device("cpu"))(logits)
    assert drawn.shape == (DRAWS,)
    assert drawn.dtype == torch.int64
    return drawn.bincount(minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1e-6}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 4, "top_p": 0.7}, [1, 3]),  # of what top_k leaves
        ({"top_p": 0.9, "min_p": 0.5}, [1, 3]),
    ],
)
def test_options_leave_these_tokens(options: dict[str, float], left: list[int]) -> None:
    found = shares(Sampling(temperature=1.0, seed=3, **options))  # type: ignore[arg-type]
    expected = torch.zeros(5)
    expected[left] = PROBABILITIES[left] / PROBABILITIES[left].sum()
    assert (found[expected == 0] == 0).all()
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)


def test_temperature() -> None:
    expected = PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum()
    torch.testing.assert_close(shares(Sampling(temperature=2.0, seed=1)), expected, atol=0.015, rtol=0)
    assert shares(Sampling(temperature=0))[1] == 1


def test_rows_are_independent_and_seeds_repeat() -> None:
    logits = torch.randn(4, 50)
    first, again, other = (
        torch.stack([sampler(logits) for _ in range(8)])
        for sampler in (Sampler(Sampling(1.0, top_p=0.9, seed=s), torch.device("cpu")) for s in (1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(column.tolist()) for column in first.T}) == 4
