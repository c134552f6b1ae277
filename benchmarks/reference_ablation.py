"""At equal bytes: bits by κ, by role, or by κ dealt out at random among the tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.planning.plan import KEPT, Choice, Plan
from kappaquant.planning.policies.base import Budget, choice_bytes
from kappaquant.planning.sizes import summary

THRESHOLDS, LADDER = (4.0, 8.0, 15.0), (3, 4, 5, KEPT_BITS)  # the kurtosis policy's defaults
TOLERANCE = 0.005


@dataclass(frozen=True)
class Deciding:
    """The tensors that policies decide, and what they cost.

    Attributes:
        base: a plan that gives them all the least bits.
        tensors, config: of the source.
        kappa: excess kurtosis by name.
    """

    base: Plan
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    kappa: Mapping[str, float]

    @property
    def names(self) -> list[str]:
        return [name for name, choice in self.base.choices.items() if choice.format != KEPT]

    def nbytes(self, plan: Plan) -> int:
        """Exact bytes of all tensors under a plan."""
        return summary(plan, self.tensors, self.config).output_bytes

    def by_kappa(self, budget: int) -> Plan:
        """The kurtosis policy with its thresholds multiplied by one number, as large a plan as ``budget`` bytes allow.

        Where single steps do not fit any more they are passed over, and smaller ones that come next are taken.
        """
        return self._ranked(self.kappa, budget, "κ")

    def at_random(self, budget: int, seed: int) -> Plan:
        """The same with the κ of the tensors shuffled among them: same policy, same bytes, no evidence."""
        names = self.names
        dealt = [self.kappa[name] for name in names]
        random.Random(seed).shuffle(dealt)
        return self._ranked(dict(zip(names, dealt, strict=True)), budget, f"random {seed}")

    def _ranked(self, kappa: Mapping[str, float], budget: int, why: str) -> Plan:
        bits = dict.fromkeys(self.names, LADDER[0])
        used = self.nbytes(self.base)
        for name, step in _steps({name: kappa[name] for name in self.names}):
            cost = self._cost(name, LADDER[step + 1]) - self._cost(name, bits[name])
            if used + cost <= budget:
                bits[name] = LADDER[step + 1]
                used += cost
        choices = {**self.base.choices, **{name: self._choice(name, b, why) for name, b in bits.items()}}
        return Plan(choices, self.base.group_size, why, {"budget": budget})

    def _cost(self, name: str, bits: int) -> int:
        return choice_bytes(self._choice(name, bits, ""), self.tensors[name])

    def _choice(self, name: str, bits: int, why: str) -> Choice:
        return Budget(group_size=self.base.group_size).choice(self.tensors[name], bits, why)


def _steps(kappa: Mapping[str, float]) -> list[tuple[str, int]]:
    """(tensor, step of the ladder) in the order in which falling thresholds reach κ; κ ≤ 0 is never reached."""
    reached = [(k / t, name, step) for name, k in kappa.items() if k > 0 for step, t in enumerate(THRESHOLDS)]
    return [(name, step) for _, name, step in sorted(reached, key=lambda r: (-r[0], r[1], r[2]))]


def equal_bytes(sizes: Sequence[int], budget: int) -> bool:
    """Whether all sizes lie within 0.5 % of the budget."""
    return all(abs(size - budget) <= TOLERANCE * budget for size in sizes)
