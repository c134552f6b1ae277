"""Plans and their making: the public name of ``kappaquant.planning.plan`` and ``kappaquant.planning.make``."""

from kappaquant.planning.make import make_plan, overridden, parse_override
from kappaquant.planning.plan import KEPT, Choice, Plan

__all__ = ["KEPT", "Choice", "Plan", "make_plan", "overridden", "parse_override"]
