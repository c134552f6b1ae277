"""Tensors that get one width together: those that were measured together, and those that serving engines fuse."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from kappaquant.errors import PlanError
from kappaquant.planning.plan import Choice, rank_of


def tied(sets: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Sets that share no name, of sets that may: two that share one become one. In order of first mention."""
    leaders: dict[str, str] = {}

    def leader(name: str) -> str:
        while leaders.setdefault(name, name) != name:
            name = leaders[name] = leaders[leaders[name]]
        return name

    for names in sets:
        for name in names:
            leaders[leader(name)] = leader(names[0])
    found: dict[str, list[str]] = {}
    for name in leaders:
        found.setdefault(leader(name), []).append(name)
    return [tuple(names) for names in found.values()]


def check_overrides(names: Sequence[str], fixed: Mapping[str, Choice], overridden: Collection[str]) -> None:
    """Raise PlanError, naming a tensor, where overrides give some of these tensors another width, or kind of format, than the rest.

    Args:
        names: tied to each other.
        fixed: choices made already: what defaults keep, which breaks no tie, and overrides.
        overridden: which of these are overrides.
    """
    forced = {name: rank_of(fixed[name], name)[1] for name in names if name in overridden}
    free = [name for name in names if name not in fixed]
    odd = next((name for name, short in forced.items() if short != next(iter(forced.values()))), None)
    if not forced or (not free and odd is None):
        return
    first = next(iter(forced))
    name, other = (odd, first) if odd else (first, free[0])
    rest = forced[other] if odd else "no override"
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    raise PlanError(
        f"{name}: {fixed[name].why} to {forced[name]}, which breaks a tie: it gets one width and kind with {other} ({rest}){more}; "
        "override all of them alike, or none"
    )
