"""Times taken in turns: everything that is compared runs once in every round, so that what else the machine does meets all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Times:
    """Seconds of one thing, a median for each round; what is compared has as many rounds.

    Attributes:
        rounds: in the order in which they were taken.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: Times) -> float:
        """How many times faster this is than the other."""
        return other.median / self.median

    def less(self, other: Times, parts: int) -> Times:
        """What is left of each round without the other's time, in so many equal parts.

        Raises:
            SystemExit: nothing is left of most rounds.
        """
        left = Times(tuple((ours - theirs) / parts for ours, theirs in zip(self.rounds, other.rounds, strict=True)))
        if left.median <= 0:
            raise SystemExit("a model took no longer than one of fewer layers: the machine is too busy to measure on")
        return left

    def to_json(self, per_second: float = 1e3) -> dict[str, float]:
        """Median, least and most, by default in milliseconds."""
        values = (self.median, min(self.rounds), max(self.rounds))
        return {
            key: round(value * per_second, 4) for key, value in zip(("ms", "least_ms", "most_ms"), values, strict=True)
        }


def in_turns(things: Mapping[str, Thing], work: Callable[[Thing], Sequence[float]], rounds: int) -> dict[str, Times]:
    """``work`` of each thing in each round, after a round that is not counted; each round begins with the next thing.

    Args:
        work: seconds of what it did, of which a round counts the median.
    """
    names, found = list(things), {name: list[float]() for name in things}
    for number in range(-1, rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            took = statistics.median(work(things[name]))
            if number >= 0:
                found[name].append(took)
    return {name: Times(tuple(rounds)) for name, rounds in found.items()}
