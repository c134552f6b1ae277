"""The allocation: equal to trying everything, never above a budget, and fast on a large model's shapes."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kappaquant.planning import allocation
from kappaquant.planning.allocation import Option, allocate

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
OPTIONS = st.builds(
    Option,
    cost=st.one_of(st.integers(0, 8).map(float), st.floats(0, 1e-3), st.floats(0, 1e4)),
    size=st.integers(0, 30),
    active=st.integers(0, 12),
)
VARIABLES = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), max_size=5)
LIMITS = st.one_of(st.none(), st.integers(0, 90))


def best_of_all(variables: list[list[Option]], size: int | None, active: int | None) -> float | None:
    """The lowest cost over every choice there is."""
    fitting = [
        sum(option.cost for option in choice)
        for choice in product(*variables)
        if (size is None or sum(option.size for option in choice) <= size)
        and (active is None or sum(option.active for option in choice) <= active)
    ]
    return min(fitting, default=None)


def widths(names: int, seed: int, noise: float = 0.02) -> list[list[Option]]:
    """Variables of shapes as in a mixture of experts of 35 B weights, with random sensitivities over three decades."""
    rng = np.random.default_rng(seed)
    weights = (2048 * 4096, 2048 * 512, 2048 * 512, 4096 * 2048, 2**29, 2**28, 2**20, 2**20, 2**20, 2**24, 2**23, 2**23)
    found = []
    for number in range(names):
        count, routed = weights[number % 12], number % 12 in (4, 5)
        cost = rng.lognormal(-7, 1.5)
        options = []
        for bits in BITS:
            nbytes = count * bits // 8 + (bits < 16) * count // 64
            error = 4.0 ** (2 - bits) * rng.lognormal(0, noise) if bits < 16 else 0.0
            options.append(Option(cost * error, nbytes, nbytes // 32 if routed else nbytes))
        found.append(options)
    return found


def spans(variables: list[list[Option]], share: float) -> tuple[int, int]:
    """Budgets at this share of the way from two bits for all to eight."""
    few, many = ([options[at] for options in variables] for at in (0, 6))
    return (
        round((1 - share) * sum(o.size for o in few) + share * sum(o.size for o in many)),
        round((1 - share) * sum(o.active for o in few) + share * sum(o.active for o in many)),
    )


@settings(max_examples=300, deadline=None)
@given(VARIABLES, LIMITS, LIMITS)
def test_it_equals_trying_everything(variables: list[list[Option]], size: int | None, active: int | None) -> None:
    found, expected = allocate(variables, size, active), best_of_all(variables, size, active)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.cost == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.proven
    assert found.bound <= expected + 1e-9 * max(1.0, expected)
    chosen = [options[number] for options, number in zip(variables, found.chosen, strict=True)]
    assert (found.size, found.active) == (sum(o.size for o in chosen), sum(o.active for o in chosen))
    assert size is None or found.size <= size
    assert active is None or found.active <= active


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 60), st.integers(0, 10**6), st.floats(0.02, 0.98), st.floats(0.02, 1.2))
@example(27, 435, 0.5, 0.5)  # the relaxed optimum is whole
def test_it_keeps_to_both_budgets(names: int, seed: int, share: float, active_share: float) -> None:
    variables = widths(names, seed)
    size, active = spans(variables, share)[0], spans(variables, active_share)[1]
    found = allocate(variables, size, active)
    assert found is not None
    assert found.size <= size
    assert found.active <= active
    assert found.bound <= found.cost
    assert found.cost <= sum(options[0].cost for options in variables)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_model_within_two_budgets_takes_two_seconds(seed: int) -> None:
    variables = widths(40 * 12, seed)
    size, active = spans(variables, 0.3)[0], spans(variables, 0.4)[1]
    allocate(variables[:2], 10**8)  # imports the solver
    start = time.process_time()
    found = allocate(variables, size, active)
    assert time.process_time() - start < 2
    assert found is not None
    assert 0.995 * size <= found.size <= size
    assert found.active <= active
    assert found.proven
    assert found.gap < 0.005


def test_what_is_cut_short_keeps_to_the_budget_and_says_that_it_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = widths(60, 5)
    size = spans(variables, 0.3)[0]
    best = allocate(variables, size)
    monkeypatch.setattr(allocation, "MOST_STATES", 40)
    short = allocate(variables, size)
    assert best is not None
    assert short is not None
    assert best.proven
    assert not short.proven
    assert short.size <= size
    assert best.cost <= short.cost
    assert short.bound == best.bound


def test_without_a_budget_each_takes_its_best() -> None:
    found = allocate([[Option(2.0, 1), Option(1.0, 9)], [Option(0.0, 5)]])
    assert found is not None
    assert (found.chosen, found.cost, found.size, found.gap) == ((1, 0), 1.0, 14, 0.0)


def test_budgets_that_nothing_fits() -> None:
    assert allocate([[Option(1.0, 5)], [Option(1.0, 6)]], 10) is None
    assert allocate([[Option(1.0, 1, 9), Option(1.0, 9, 1)]], 5, 5) is None
