"""The same bits for every tensor."""

from __future__ import annotations

from dataclasses import dataclass

from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import Choice, check_bits_or_kept
from kappaquant.planning.policies.base import Budget, Evidence, Policy, option


@dataclass(frozen=True)
class Uniform(Policy):
    """``bits`` (2..8, or 16) for every tensor that no default keeps."""

    name = "uniform"
    bits: int = option(3, "2 to 8.")

    def __post_init__(self) -> None:
        check_bits_or_kept(self.bits, "uniform policy")

    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> dict[str, Choice]:
        return {n: budget.choice(inventory.tensors[n], self.bits, "uniform") for n in budget.free(inventory)}
