"""The best choice of one option for each variable within one or two budgets of bytes: numbers in, numbers out.

A multiple-choice knapsack. Its linear relaxation (HiGHS) gives prices of bytes; at these prices almost every variable has one option
that no other can beat, and what is left is searched exactly, in integers, so that no solver's tolerance touches a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_STATES = 2_000
"""Partial choices that the search keeps; where there are more it goes on with the most promising ones, and proves nothing."""
_BUDGETS = 2
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Option:
    """One way to store what a variable stands for.

    Attributes:
        cost: what it costs the model, in any unit; lower is better.
        size: bytes.
        active: bytes read for each decoded token.
    """

    cost: float
    size: int
    active: int = 0


@dataclass(frozen=True)
class Allocation:
    """One option for each variable.

    Attributes:
        chosen: number of each variable's option.
        cost, size, active: sums over these.
        bound: what the relaxed problem costs, in which variables may be split between options; no choice costs less.
        proven: nothing within the budgets costs less than this choice.
    """

    chosen: tuple[int, ...]
    cost: float
    size: int
    active: int
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """How far the cost is above the relaxed optimum, as a share of the cost."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0


def allocate(
    variables: Sequence[Sequence[Option]], size: int | None = None, active: int | None = None
) -> Allocation | None:
    """The choice of lowest cost whose bytes keep to the budgets; None where none does.

    Args:
        variables: each one's options, one at least.
        size: bytes that all may take together; None sets no limit.
        active: bytes that all may have read for a token, likewise.
    """
    problem = _Problem.of(variables, size, active)
    prices = problem.prices()
    chosen, proven = _search(problem, prices)
    if chosen is None:
        return None
    taken = [options[number] for options, number in zip(variables, chosen, strict=True)]
    cost = sum(option.cost for option in taken)
    return Allocation(
        chosen=tuple(map(int, chosen)),
        cost=cost,
        size=sum(option.size for option in taken),
        active=sum(option.active for option in taken),
        bound=min(problem.bound(prices), cost),  # sums in another order may end a bit higher
        proven=proven,
    )


Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Problem:
    """The variables as arrays, [variables, options]; where one has fewer options than another, its cost is infinite.

    Attributes:
        cost: of each option.
        spent: bytes, [variables, options, budgets].
        limits: of each budget.
    """

    cost: Floats
    spent: Integers
    limits: Integers

    @classmethod
    def of(cls, variables: Sequence[Sequence[Option]], size: int | None, active: int | None) -> _Problem:
        widest = max(map(len, variables), default=1)
        cost = np.full((len(variables), widest), np.inf)
        spent = np.zeros((len(variables), widest, _BUDGETS), np.int64)
        for row, options in enumerate(variables):
            cost[row, : len(options)] = [option.cost for option in options]
            spent[row, : len(options)] = [(option.size, option.active) for option in options]
        limits = np.array([_UNLIMITED if limit is None else limit for limit in (size, active)], np.int64)
        return cls(cost, spent, limits)

    def total(self, chosen: Integers) -> tuple[float, Integers]:
        rows = np.arange(len(chosen))
        return float(self.cost[rows, chosen].sum()), self.spent[rows, chosen].sum(axis=0)

    def fits(self, chosen: Integers) -> bool:
        return bool((self.total(chosen)[1] <= self.limits).all())

    def priced(self, prices: Floats) -> Floats:
        """Cost and bytes of each option at these prices, above the best option of its variable: zero or more."""
        value = self.cost + self.spent @ prices
        return value - value.min(axis=1, keepdims=True)

    def bound(self, prices: Floats) -> float:
        """What no choice within the budgets costs less than, whatever the prices (Lagrange); the relaxed optimum at the best ones."""
        best = (self.cost + self.spent @ prices).min(axis=1).sum()
        return float(
            best - sum(price * limit for price, limit in zip(prices, self.limits.tolist(), strict=True) if price)
        )

    def prices(self) -> Floats:
        """What one more byte of each budget is worth to the relaxed problem; zero where there are bytes enough, or no solution."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_array

        most = self.spent.max(axis=1, initial=0).sum(axis=0)
        tight = [budget for budget in range(_BUDGETS) if self.limits[budget] < most[budget]]
        prices = np.zeros(_BUDGETS)
        if not tight:
            return prices
        rows, _ = at = np.nonzero(np.isfinite(self.cost))
        one_each: Any = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
        # costs and budgets are brought to the order of 1, for the solver's tolerances
        scale = float(np.ptp(self.cost[at])) or 1.0
        units = np.maximum(self.limits[tight], 1).astype(float)
        found = linprog(
            self.cost[at] / scale, A_ub=(self.spent[at][:, tight] / units).T, b_ub=self.limits[tight] / units,
            A_eq=one_each, b_eq=np.ones(len(self.cost)), method="highs",
        )  # fmt: skip
        if found.status == 0:
            prices[tight] = np.maximum(-found.ineqlin.marginals, 0.0) * scale / units
        return prices


@dataclass
class _Best:
    """The best whole choice met so far: how much it costs above the bound, and its options."""

    above: float = math.inf
    chosen: Integers | None = None


def _search(problem: _Problem, prices: Floats) -> tuple[Integers | None, bool]:
    """The best choice, and whether none is better: a few partial choices first, whose result narrows the search that follows."""
    best = _Best()
    smallest = np.where(np.isfinite(problem.cost)[..., None], problem.spent, _UNLIMITED).argmin(axis=1)
    for chosen in filter(problem.fits, smallest.T):
        above = problem.total(chosen)[0] - problem.bound(prices)
        if above < best.above:
            best.above, best.chosen = above, chosen
    proven = False
    for states, near in ((MOST_STATES // 10, 0.3), (MOST_STATES, 0.02)):
        proven = _pass(problem, prices, best, states, near)
        if proven:
            break
    return best.chosen, proven


def _pass(problem: _Problem, prices: Floats, best: _Best, most: int, near: float) -> bool:
    """Improve ``best``, variable by variable, by at most ``most`` partial choices at a time; whether none was dropped for that.

    A choice costs, above the bound, what its options cost at the prices plus the unspent bytes at their price. All variables begin at
    their best option, so that a partial choice is a whole one too; it is given up once it cannot become better than ``best``. Where
    there are too many, those go on that cost least, with this share of what lies between them and the budgets, at its price.
    """
    priced = problem.priced(prices)
    base = priced.argmin(axis=1)
    rows = np.arange(len(base))
    left = problem.limits - problem.spent[rows, base].sum(axis=0)
    change = problem.spent - problem.spent[rows, base][:, None]
    open_to = priced <= best.above
    free = np.flatnonzero(open_to.sum(axis=1) > 1)
    reach = np.ptp(np.where(open_to[free][..., None], change[free], 0), axis=1)
    free = free[np.lexsort((reach[:, 1], reach[:, 0]))[::-1]]  # equal steps of many bytes first: few different sums
    within = np.where(open_to[free][..., None], change[free], 0)
    more, fewer = _to_come(within.max(axis=1, initial=0)), _to_come(within.min(axis=1, initial=0))
    above, spent = np.zeros(1), np.zeros((1, _BUDGETS), np.int64)
    steps: list[tuple[Integers, Integers]] = []
    whole = True
    _finish(best, problem, prices, above, left - spent, base, free, steps)
    for number, variable in enumerate(free):
        numbers = np.flatnonzero(open_to[variable])
        above = (above[:, None] + priced[variable, numbers]).ravel()
        spent = (spent[:, None] + change[variable, numbers]).reshape(-1, _BUDGETS)
        room = left - spent
        unspent = np.maximum(room - more[number + 1], 0) @ prices
        kept = np.flatnonzero((above + unspent < best.above) & (room >= fewer[number + 1]).all(axis=1))
        kept = kept[_undominated(above[kept], spent[kept], prices)]
        if len(kept) > most:
            whole = False
            promise = above[kept] + unspent[kept] + near * (np.abs(room[kept]) @ prices)
            kept = kept[np.argsort(promise, kind="stable")[:most]]
        steps.append((kept // len(numbers), numbers[kept % len(numbers)]))
        above, spent = above[kept], spent[kept]
        if not len(kept):
            break
        _finish(best, problem, prices, above, left - spent, base, free, steps)
    return whole


def _to_come(changes: Integers) -> Integers:
    """By how much the variables from each one on can change what is spent; [variables + 1, budgets]."""
    after = np.zeros((len(changes) + 1, _BUDGETS), np.int64)
    after[:-1] = changes[::-1].cumsum(axis=0)[::-1]
    return after


def _undominated(above: Floats, spent: Integers, prices: Floats) -> Integers:
    """Numbers of the partial choices that none with as few bytes matches in cost."""
    cost = above - spent @ prices
    order = np.lexsort((cost, spent[:, 1], spent[:, 0]))
    same = (np.diff(spent[order], axis=0) == 0).all(axis=1)
    order = order[np.concatenate([[True], ~same])] if len(order) else order
    if (spent[:, 1] == 0).all():
        lowest = np.minimum.accumulate(np.concatenate([[np.inf], cost[order]]))[:-1]
        order = order[cost[order] < lowest]
    return order


def _finish(
    best: _Best,
    problem: _Problem,
    prices: Floats,
    above: Floats,
    room: Integers,
    base: Integers,
    free: Integers,
    steps: list[tuple[Integers, Integers]],
) -> None:
    """Take the best of these partial choices that fits, all other variables at their best option, if it is better than ``best``."""
    fits = (room >= 0).all(axis=1)
    total = np.where(fits, above + np.where(prices > 0, room, 0) @ prices, np.inf)
    at = int(total.argmin())
    if total[at] >= best.above:
        return
    chosen = base.copy()
    best.above = float(total[at])
    for variable, (parents, numbers) in zip(free[: len(steps)][::-1], steps[::-1], strict=True):
        chosen[variable] = numbers[at]
        at = parents[at]
    best.chosen = chosen
