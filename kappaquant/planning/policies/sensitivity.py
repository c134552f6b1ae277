"""Bits by measured sensitivity: the least predicted divergence from the original within an exact budget of bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

from kappaquant.errors import BudgetError, PlanError
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.formats.kinds import KINDS, USUAL
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import KEPT, Choice
from kappaquant.planning.policies.base import Budget, Decision, Evidence, Policy, active_bytes, check_limit
from kappaquant.planning.sensitivity import SHRINKABLE, Sensitivities, Unit
from kappaquant.planning.sizes import active_shares, shown
from kappaquant.planning.ties import check_overrides, tied

if TYPE_CHECKING:
    from kappaquant.planning.allocation import Allocation, Option

_Width = tuple[int, str]
"""Bits, and the kind of the formats."""
_UNPACKED: _Width = (KEPT_BITS, "")


@dataclass(frozen=True)
class Sensitivity(Policy):
    """2 to 8 or 16 bits for each unit of the evidence, so that the units' predicted divergences add up to as little as can be.

    A unit is the tensors of one layer and role, which get one width, in formats of one kind: of kinds that take the same bytes, the one
    in which it loses least. Where engines fuse tensors and that is asked for, their units are one choice. Embedding and head are decided
    too where the evidence has them.
    """

    name = "sensitivity"
    takes_size = True
    takes_active = True
    reads_evidence = True

    def claims(self, inventory: Inventory, evidence: Evidence) -> Collection[str]:
        units = evidence.sensitivity.units if evidence.sensitivity else ()
        kinds = inventory.kinds
        return {name for unit in units for name in unit.tensors if name in kinds and kinds[name].role in SHRINKABLE}

    def kinds(self, evidence: Evidence) -> tuple[str, ...]:
        """All that were measured."""
        return evidence.sensitivity.kinds if evidence.sensitivity else USUAL

    def choose(self, inventory: Inventory, evidence: Evidence, budget: Budget) -> Decision:
        if evidence.sensitivity is None:
            raise PlanError(
                "the sensitivity policy needs evidence; run calibrate first and pass what it wrote (--evidence)"
            )
        if budget.size is None and budget.active is None:
            raise PlanError("the sensitivity policy needs a budget of bytes; give one, such as --size 18GB")
        return _Planner(evidence.sensitivity, inventory, budget).decision()


@dataclass(frozen=True)
class _Variable:
    """What gets one width.

    Attributes:
        names: tensors that are to be decided.
        units: which they are from.
        widths: that may be chosen.
        options: what each costs and takes.
    """

    names: tuple[str, ...]
    units: tuple[Unit, ...]
    widths: tuple[_Width, ...]
    options: tuple[Option, ...]

    def width_by(self, budget: str, largest: bool = False) -> _Width:
        """The width of fewest, or most, bytes of "size" or "active"."""
        pick = max if largest else min
        number, _ = pick(enumerate(self.options), key=lambda pair: getattr(pair[1], budget))
        return self.widths[number]


@dataclass(frozen=True)
class _Planner:
    """One source, its evidence and a budget."""

    evidence: Sensitivities
    inventory: Inventory
    budget: Budget

    def decision(self) -> Decision:
        variables = list(self._variables())
        self._check_limits(variables)
        fixed, unpredicted = self._fixed_losses()
        found = self._allocated(variables)
        widths = self._widths(variables, found)
        losses = {u: self._loss(u, w) for v, w in zip(variables, widths, strict=True) for u in v.units}
        total = sum(losses.values()) + fixed
        relaxed = min(found.bound + fixed, total) if found else total
        choices = {}
        for variable, width in zip(variables, widths, strict=True):
            for name in variable.names:
                why = f"predicted {losses[self._unit_of[name]]:.2g} of {total:.3g} {self._scale_name}"
                choices[name] = self._choice(name, width, why)
        kind = "kld" if self._measured else "error"
        inputs: dict[str, Any] = {
            "evidence": {key: getattr(self.evidence, key) for key in ("kind", "model", "revision", "sha256", "effort")},
            f"predicted_{kind}": _rounded(total),
            f"relaxed_{kind}": _rounded(relaxed),
        }
        return Decision(choices, inputs, tuple(self._warnings(unpredicted)))

    @cached_property
    def _unit_of(self) -> dict[str, Unit]:
        """The unit of each tensor. Raises PlanError for one that the source does not have, or a free one that is in none."""
        units = {name: unit for unit in self.evidence.units for name in unit.tensors}
        for name, unit in units.items():
            if name not in self.inventory.tensors:
                raise PlanError(
                    f"{name}: in the evidence ({unit.family}), but not in the source; calibrate this very model"
                )
        for name in self.budget.free(self.inventory):
            if name not in units:
                raise PlanError(
                    f"{name}: the evidence does not have it; calibrate this very model, or set its bits by hand"
                )
        return units

    @cached_property
    def _measured(self) -> bool:
        return any(unit.kld is not None for unit in self.evidence.units)

    @property
    def _scale_name(self) -> str:
        return "nats" if self._measured else "of relative squared error"

    @cached_property
    def _shares(self) -> Mapping[str, Any]:
        return active_shares(self.inventory.tensors, self.inventory.config)

    @cached_property
    def _usual(self) -> float:
        """Divergence for each unit of relative squared error: the median of the units that have one, for those that have none."""
        found = []
        for unit in self.evidence.units:
            if unit.kld is None or unit.bits is None:
                continue
            formats = {name: self.evidence.format_at(name, unit.bits, unit.kind) for name in unit.tensors}
            if error := self.evidence.loss(replace(unit, kld=None), formats):
                found.append(unit.kld / error)
        return median(found) if found else 1.0

    def _loss(self, unit: Unit, width: _Width) -> float:
        """Predicted loss of a unit whose free tensors have this width. Raises PlanError where that was not measured."""
        formats = {name: self._format(name, width) for name in unit.tensors}
        loss = self.evidence.loss(unit, formats)
        return loss if unit.kld is not None or not self._measured else loss * self._usual

    def _format(self, name: str, width: _Width) -> str | None:
        choice = self.budget.fixed.get(name) or self._choice(name, width)
        return None if choice.format == KEPT else choice.format

    def _variables(self) -> Iterator[_Variable]:
        units, fixed = self._unit_of, self.budget.fixed
        self.evidence.check_measured(self.budget.free(self.inventory), self.budget.kinds)
        sets = [unit.tensors for unit in self.evidence.units] + (self.inventory.fused if self.budget.fuse else [])
        for group in tied(sets):
            check_overrides(group, fixed, self.budget.overridden)
            if free := tuple(name for name in group if name not in fixed):
                yield self._variable(free, tuple(dict.fromkeys(units[name] for name in free)))

    def _variable(self, names: tuple[str, ...], units: tuple[Unit, ...]) -> _Variable:
        from kappaquant.planning.allocation import Option

        every = [(bits, kind) for kind in self.budget.kinds for bits in KINDS[kind].bits]
        known = [width for width in every if all(self._has_error(name, width) for name in names)]
        best: dict[tuple[int, int], tuple[_Width, Option]] = {}  # by what it takes
        # where none is known, the loss at any says what there is instead
        for width in (*(known or every[:1]), _UNPACKED):
            choices = {name: self._choice(name, width) for name in names}
            size = sum(self.budget.nbytes(choice, self.inventory.tensors[name]) for name, choice in choices.items())
            active = active_bytes(choices, self.inventory, self._shares)
            option = Option(sum(self._loss(unit, width) for unit in units), size, active)
            if (size, active) not in best or option.cost < best[size, active][1].cost:
                best[size, active] = width, option
        widths, options = zip(*best.values(), strict=True)
        return _Variable(names, units, widths, options)

    def _choice(self, name: str, width: _Width, why: str = "") -> Choice:
        bits, kind = width
        return self.budget.choice(self.inventory.tensors[name], bits, why, kind)

    def _has_error(self, name: str, width: _Width) -> bool:
        return self._format(name, width) in self.evidence.tensors[name].errors

    def _fixed_losses(self) -> tuple[float, list[str]]:
        """Predicted loss of what overrides set, and names of these for which nothing can be predicted."""
        total, unpredicted = 0.0, []
        for unit in self.evidence.units:
            if all(name in self.budget.fixed for name in unit.tensors):
                try:
                    total += self._loss(unit, _UNPACKED)
                except PlanError:
                    unpredicted.append(unit.tensors[0])
        return total, unpredicted

    def _allocated(self, variables: list[_Variable]) -> Allocation | None:
        """The best choice whose files fit. Options count a few bytes of headers too many, so what is left of these is spent again."""
        from kappaquant.planning.allocation import allocate

        options = [variable.options for variable in variables]
        best = allocate(options)
        if best and self._fits(variables, best):
            return best
        left, active = self.budget.left(self.inventory), self.budget.active
        if active is not None:
            active -= active_bytes(self.budget.fixed, self.inventory, self._shares)
        found = allocate(options, left, active)
        if found is None or not found.proven or left is None or self.budget.size is None:
            return found
        unspent = self.budget.size - self.budget.file_bytes(self._choices(variables, self._widths(variables, found)))
        again = allocate(options, found.size + unspent, active) if found.size + unspent > left else None
        return again if again and self._fits(variables, again) else found

    def _fits(self, variables: list[_Variable], found: Allocation) -> bool:
        spent = self._spent(self._choices(variables, self._widths(variables, found)))
        return all(limit is None or taken <= limit for limit, taken in spent)

    def _choices(self, variables: list[_Variable], widths: list[_Width]) -> dict[str, Choice]:
        made = {
            name: self._choice(name, width)
            for variable, width in zip(variables, widths, strict=True)
            for name in variable.names
        }
        return {**self.budget.fixed, **made}

    def _widths(self, variables: list[_Variable], found: Allocation | None) -> list[_Width]:
        """The width of each variable. The bytes of options are a few too many: the smallest plan may fit though none was found."""
        if found:
            return [variable.widths[number] for variable, number in zip(variables, found.chosen, strict=True)]
        widths = [variable.width_by("size" if self.budget.active is None else "active") for variable in variables]
        choices = self._choices(variables, widths)
        if any(limit is not None and taken > limit for limit, taken in self._spent(choices)):
            size, active = shown(self.budget.size or 0), shown(self.budget.active or 0)
            raise BudgetError(f"no plan keeps to both a size of {size} and {active} for a token; raise one of them")
        return widths

    def _spent(self, choices: Mapping[str, Choice]) -> Iterator[tuple[int | None, int]]:
        yield self.budget.size, self.budget.file_bytes(choices)
        yield self.budget.active, active_bytes(choices, self.inventory, self._shares)

    def _check_limits(self, variables: list[_Variable]) -> None:
        """Raise BudgetError for a budget below the smallest plan or above the largest."""
        for number, (what, key) in enumerate((("size", "size"), ("active size", "active"))):
            limit = (self.budget.size, self.budget.active)[number]
            if limit is None:
                continue
            ends = []
            for largest in (False, True):
                widths = [variable.width_by(key, largest) for variable in variables]
                ends.append(list(self._spent(self._choices(variables, widths)))[number][1])
            check_limit(what, limit, *ends)

    def _warnings(self, unpredicted: list[str]) -> Iterator[str]:
        if not self._measured:
            yield (
                "nothing was measured on text: the evidence is of weights alone, predicted errors are no divergences, and every "
                "layer is taken to matter alike; calibrate with text for a plan that knows better"
            )
        elif without := [unit for unit in self.evidence.units if unit.kld is None]:
            yield (
                f"{len(without)} of {len(self.evidence.units)} units have no measured divergence, such as {without[0].tensors[0]}: "
                "theirs is predicted from their error, by the median of the others"
            )
        if unpredicted:
            yield (
                f"{unpredicted[0]}{f' and {len(unpredicted) - 1} more' * (len(unpredicted) > 1)}: overridden to a format that "
                "was not measured, and not in the prediction"
            )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
