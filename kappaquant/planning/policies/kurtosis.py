"""Bits by measured excess kurtosis κ: the heavier a tensor's tails, the more."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import check_bits
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import Choice
from kappaquant.planning.policies.base import Budget, Decision, Evidence, Policy, check_limit, option


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class Kurtosis(Policy):
    """``ladder[i]`` bits below κ = ``thresholds[i]`` (a Gaussian has 0), 16 from the last one on. A size multiplies all thresholds by one factor.

    Attributes:
        thresholds: ascending; κ equal to one belongs to the step above.
        ladder: bits of each step, as many as thresholds.
    """

    name = "kurtosis"
    takes_size = True
    reads_profile = True
    reads_evidence = True
    thresholds: tuple[float, ...] = option((4, 8, 15), "κ at which each width of the ladder ends, ascending.", _floats)
    ladder: tuple[int, ...] = option((3, 4, 5), "widths, one per threshold; 16 bits above the last.", _ints)

    def __post_init__(self) -> None:
        for bits in self.ladder:
            check_bits(bits)
        if len(self.thresholds) != len(self.ladder) or not self.thresholds:
            raise PlanError(
                f"{len(self.thresholds)} thresholds for {len(self.ladder)} bit widths; each threshold ends one width"
            )
        ascending = all(low < high for low, high in pairwise(self.thresholds))
        if not ascending or not all(map(math.isfinite, self.thresholds)):
            raise PlanError(f"thresholds {list(self.thresholds)}: they must be finite and ascending, such as 4, 8, 15")

    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> Decision:
        if evidence.kurtosis is None:
            raise PlanError("the kurtosis policy needs a profile of the weights; run scan first and pass what it wrote")
        measured = {name: _measured(name, evidence.kurtosis) for name in budget.free(inventory)}
        if budget.size is None:
            return Decision(self._choices(measured, inventory, budget))
        factor = self._factor(measured, inventory, budget, budget.size)
        scaled = replace(self, thresholds=tuple(limit * factor for limit in self.thresholds))
        return Decision(scaled._choices(measured, inventory, budget), {"factor": factor})

    def _choices(self, measured: Mapping[str, float], inventory: Inventory, budget: Budget) -> dict[str, Choice]:
        return {n: budget.choice(inventory.tensors[n], *self._step(kappa)) for n, kappa in measured.items()}

    def _step(self, kappa: float) -> tuple[int, str]:
        for limit, bits in zip(self.thresholds, self.ladder, strict=True):
            if kappa < limit:
                return bits, f"κ {kappa:.3g} < {limit:g}"
        return KEPT_BITS, f"κ {kappa:.3g} ≥ {self.thresholds[-1]:g}"

    def _factor(self, measured: Mapping[str, float], inventory: Inventory, budget: Budget, size: int) -> float:
        """What all thresholds are multiplied by for the largest plan that fits.

        Raises:
            BudgetError: the smallest plan does not, or the largest leaves bytes.
            PlanError: thresholds or a ladder with which a larger factor is not always a smaller plan.
        """
        if self.thresholds[0] <= 0 or any(low >= high for low, high in pairwise(self.ladder)):
            raise PlanError(
                f"thresholds {list(self.thresholds)} and ladder {list(self.ladder)}: where a size scales them, thresholds must be above "
                "0 and the ladder ascending"
            )
        # between two of these no tensor changes its step
        steps = sorted({kappa / limit for kappa in measured.values() if kappa > 0 for limit in self.thresholds})
        factors = [(low + high) / 2 for low, high in pairwise([0.0, *steps, 2 * steps[-1]])] if steps else [1.0]

        def taken(factor: float) -> int:
            scaled = replace(self, thresholds=tuple(limit * factor for limit in self.thresholds))
            return budget.file_bytes({**budget.fixed, **scaled._choices(measured, inventory, budget)})

        check_limit("size", size, taken(factors[-1]), taken(factors[0]))
        return factors[bisect_left(factors, True, key=lambda factor: taken(factor) <= size)]


def _measured(name: str, profile: Mapping[str, float | None]) -> float:
    if name not in profile:
        raise PlanError(f"{name}: the profile has no κ for it; scan this very checkpoint, or set its bits by hand")
    kappa = profile[name]
    if kappa is None or not math.isfinite(kappa):
        raise PlanError(f"{name}: κ = {kappa} in the profile is not a number; set the tensor's bits by hand")
    return kappa
