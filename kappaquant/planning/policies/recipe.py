"""Bits by role, as published checkpoints have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kappaquant.errors import PlanError
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import Role
from kappaquant.planning.plan import Choice
from kappaquant.planning.policies.base import Budget, Evidence, Policy, option

_ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_QKV, Role.ATTENTION_O)
_DOWN = (Role.ROUTED_DOWN, Role.SHARED_DOWN, Role.MLP_DOWN)
_SHARED = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)


@dataclass(frozen=True)
class RoleBits:
    """Bits by role: ``bits`` where a role is listed, ``base`` elsewhere; roles with a default to keep are never asked."""

    base: int
    bits: Mapping[Role, int]


_APEX2 = {**dict.fromkeys((*_ATTENTION, *_DOWN, *_SHARED), 4), Role.GDN_OUT: KEPT_BITS}
RECIPES: dict[str, RoleBits] = {
    # sensitive = what writes into the residual stream: the attention's and GatedDeltaNet's output, every down_proj
    "apex": RoleBits(3, dict.fromkeys((Role.ATTENTION_O, Role.GDN_OUT, *_DOWN), 4)),
    "apex2": RoleBits(3, _APEX2),
    "apex3": RoleBits(3, {**_APEX2, Role.SHARED_DOWN: KEPT_BITS}),
}


@dataclass(frozen=True)
class Recipe(Policy):
    """Bits by role, as one of ``RECIPES`` lists them."""

    name = "recipe"
    recipe: str = option("apex2", f"{', '.join(RECIPES)}.")

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise PlanError(f"recipe {self.recipe!r} is unknown; the recipes are {', '.join(RECIPES)}")

    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> dict[str, Choice]:
        chosen, choices = RECIPES[self.recipe], {}
        for name in budget.free(inventory):
            part = inventory.kinds[name].part
            bits = chosen.bits.get(part, chosen.base)
            choices[name] = budget.choice(inventory.tensors[name], bits, f"{self.recipe}: {part}")
        return choices
