"""Bits by measured excess kurtosis κ: the heavier a tensor's tails, the more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import check_bits
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import Choice
from kappaquant.planning.policies.base import Budget, Evidence, Policy, option


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class Kurtosis(Policy):
    """``ladder[i]`` bits below κ = ``thresholds[i]`` (a Gaussian has 0), 16 from the last one on.

    Attributes:
        thresholds: ascending; κ equal to one belongs to the step above.
        ladder: bits of each step, as many as thresholds.
    """

    name = "kurtosis"
    reads_profile = True
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

    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> dict[str, Choice]:
        if evidence.kurtosis is None:
            raise PlanError("the kurtosis policy needs a profile of the weights; run scan first and pass what it wrote")
        choices = {}
        for name in budget.free(inventory):
            info = inventory.tensors[name]
            bits, why = self._step(_measured(name, evidence.kurtosis))
            choices[name] = budget.choice(info, bits, why)
        return choices

    def _step(self, kappa: float) -> tuple[int, str]:
        for limit, bits in zip(self.thresholds, self.ladder, strict=True):
            if kappa < limit:
                return bits, f"κ {kappa:.3g} < {limit:g}"
        return KEPT_BITS, f"κ {kappa:.3g} ≥ {self.thresholds[-1]:g}"


def _measured(name: str, profile: Mapping[str, float | None]) -> float:
    if name not in profile:
        raise PlanError(f"{name}: the profile has no κ for it; scan this very checkpoint, or set its bits by hand")
    kappa = profile[name]
    if kappa is None or not math.isfinite(kappa):
        raise PlanError(f"{name}: κ = {kappa} in the profile is not a number; set the tensor's bits by hand")
    return kappa
