"""The policies: from what a tensor is, and perhaps its measured κ, to bits and a reason. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import BITS, check_bits
from kappaquant.models.roles import Role, TensorKind

KEPT = 16
"""Bits of a tensor that is stored as it is, bit for bit, whatever its dtype."""

Chooser = Callable[[str, TensorKind], tuple[int, str]]
"""(name, kind) -> (bits, why), asked only about tensors that no default keeps and no override sets."""

_ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_QKV, Role.ATTENTION_O)
_DOWN = (Role.ROUTED_DOWN, Role.SHARED_DOWN, Role.MLP_DOWN)
_SHARED = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)


@dataclass(frozen=True)
class Recipe:
    """Bits by role: ``bits`` where a role is listed, ``base`` elsewhere; roles with a default to keep are never asked."""

    base: int
    bits: Mapping[Role, int]


_APEX2 = {**dict.fromkeys((*_ATTENTION, *_DOWN, *_SHARED), 4), Role.GDN_OUT: KEPT}
RECIPES: dict[str, Recipe] = {
    # sensitive = what writes into the residual stream: the attention's and GatedDeltaNet's output, every down_proj
    "apex": Recipe(3, dict.fromkeys((Role.ATTENTION_O, Role.GDN_OUT, *_DOWN), 4)),
    "apex2": Recipe(3, _APEX2),
    "apex3": Recipe(3, {**_APEX2, Role.SHARED_DOWN: KEPT}),
}


def check_choice(bits: object, where: str) -> None:
    """Raise PlanError unless ``bits`` is 2..8 or 16; ``where`` opens the message."""
    if isinstance(bits, bool) or not isinstance(bits, int) or (bits not in BITS and bits != KEPT):
        raise PlanError(f"{where}: bits = {bits!r}; allowed are 2 to 8, or 16 to keep the tensor as it is")


def uniform(bits: int) -> Chooser:
    """The same ``bits`` (2..8, or 16) for every tensor."""
    check_choice(bits, "uniform policy")
    return lambda name, kind: (bits, "uniform")


def recipe(name: str) -> Chooser:
    """Bits by role, as one of ``RECIPES`` lists them."""
    if name not in RECIPES:
        raise PlanError(f"recipe {name!r} is unknown; the recipes are {', '.join(RECIPES)}")
    chosen = RECIPES[name]
    return lambda _, kind: (chosen.bits.get(kind.part, chosen.base), f"{name}: {kind.part}")


def kurtosis(
    profile: Mapping[str, float | None], thresholds: Sequence[float] = (4, 8, 15), ladder: Sequence[int] = (3, 4, 5)
) -> Chooser:
    """Bits by measured excess kurtosis κ (Gaussian = 0): ``ladder[i]`` below ``thresholds[i]``, 16 from the last one on.

    Args:
        profile: tensor name -> κ, as ``scan`` measured it.
        thresholds: ascending; κ equal to one belongs to the step above.
        ladder: bits of each step, as many as thresholds.
    """
    for bits in ladder:
        check_bits(bits)
    if len(thresholds) != len(ladder) or not thresholds:
        raise PlanError(f"{len(thresholds)} thresholds for {len(ladder)} bit widths; each threshold ends one width")
    ascending = all(low < high for low, high in pairwise(thresholds))
    if not ascending or not all(map(math.isfinite, thresholds)):
        raise PlanError(f"thresholds {list(thresholds)}: they must be finite and ascending, such as 4, 8, 15")

    def choose(name: str, kind: TensorKind) -> tuple[int, str]:
        if name not in profile:
            raise PlanError(f"{name}: the profile has no κ for it; scan this very checkpoint, or set its bits by hand")
        kappa = profile[name]
        if kappa is None or not math.isfinite(kappa):
            raise PlanError(f"{name}: κ = {kappa} in the profile is not a number; set the tensor's bits by hand")
        for limit, bits in zip(thresholds, ladder, strict=True):
            if kappa < limit:
                return bits, f"κ {kappa:.3g} < {limit:g}"
        return KEPT, f"κ {kappa:.3g} ≥ {thresholds[-1]:g}"

    return choose
