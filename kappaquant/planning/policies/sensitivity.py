"""Bits by measured sensitivity: the least predicted divergence from the original within an exact budget of bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import TYPE_CHECKING, Any

from kappaquant.errors import BudgetError, PlanError
from kappaquant.formats.codebook import BITS
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.formats.kinds import CODEBOOK, kinds_of_width
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import KEPT, Choice
from kappaquant.planning.policies.base import Budget, Decision, Evidence, Policy, active_bytes, check_limit
from kappaquant.planning.sensitivity import SHRINKABLE, Sensitivities, Unit
from kappaquant.planning.sizes import active_shares, shown
from kappaquant.planning.ties import check_overrides, tied

if TYPE_CHECKING:
    from kappaquant.planning.allocation import Allocation, Option


@dataclass(frozen=True)
class Sensitivity(Policy):
    """2 to 8 or 16 bits for each unit of the evidence, so that the units' predicted divergences add up to as little as can be.

    A unit is the tensors of one layer and role, which get one width; where engines fuse tensors and that is asked for, their units
    are one choice. Embedding and head are decided too where the evidence has them.
    """

    name = "sensitivity"
    takes_size = True
    takes_active = True
    reads_evidence = True

    def claims(self, inventory: Inventory, evidence: Evidence) -> Collection[str]:
        units = evidence.sensitivity.units if evidence.sensitivity else ()
        kinds = inventory.kinds
        return {name for unit in units for name in unit.tensors if name in kinds and kinds[name].role in SHRINKABLE}

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
        widths: bits that may be chosen.
        options: what each costs and takes.
    """

    names: tuple[str, ...]
    units: tuple[Unit, ...]
    widths: tuple[int, ...]
    options: tuple[Option, ...]

    def width_by(self, budget: str, largest: bool = False) -> int:
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
            formats = {name: self.evidence.format_at(name, unit.bits) for name in unit.tensors}
            if error := self.evidence.loss(replace(unit, kld=None), formats):
                found.append(unit.kld / error)
        return median(found) if found else 1.0

    def _loss(self, unit: Unit, width: int) -> float:
        """Predicted loss of a unit whose free tensors have this width. Raises PlanError where that was not measured."""
        formats = {name: self._format(name, width) for name in unit.tensors}
        loss = self.evidence.loss(unit, formats)
        return loss if unit.kld is not None or not self._measured else loss * self._usual

    def _format(self, name: str, width: int) -> str | None:
        choice = self.budget.fixed.get(name) or self._choice(name, width)
        return None if choice.format == KEPT else choice.format

    def _variables(self) -> Iterator[_Variable]:
        units, fixed = self._unit_of, self.budget.fixed
        sets = [unit.tensors for unit in self.evidence.units] + (self.inventory.fused if self.budget.fuse else [])
        for group in tied(sets):
            check_overrides(group, fixed, self.budget.overridden)
            if free := tuple(name for name in group if name not in fixed):
                yield self._variable(free, tuple(dict.fromkeys(units[name] for name in free)))

    def _variable(self, names: tuple[str, ...], units: tuple[Unit, ...]) -> _Variable:
        from kappaquant.planning.allocation import Option

        widths = [w for w in self._kind_of_width if all(self._has_error(name, w) for name in names)]
        # where none is, the loss at any says what there is instead
        widths = [*(widths or list(self._kind_of_width)[:1]), KEPT_BITS]
        options = []
        for width in widths:
            choices = {name: self._choice(name, width) for name in names}
            size = sum(self.budget.nbytes(choice, self.inventory.tensors[name]) for name, choice in choices.items())
            active = active_bytes(choices, self.inventory, self._shares)
            options.append(Option(sum(self._loss(unit, width) for unit in units), size, active))
        return _Variable(names, units, tuple(widths), tuple(options))

    def _choice(self, name: str, width: int, why: str = "") -> Choice:
        return self.budget.choice(self.inventory.tensors[name], width, why, self._kind_of_width.get(width, ""))

    @cached_property
    def _kind_of_width(self) -> dict[int, str]:
        """The kind of formats that all of a width are of: where there are several, the one of less measured error over all tensors."""
        found = {width: kinds_of_width(self.budget.kinds, width) for width in BITS}
        return {
            width: min(kinds, key=partial(self._error, width)) if len(kinds) > 1 else kinds[0]
            for width, kinds in found.items()
            if kinds
        }

    def _error(self, width: int, kind: str) -> float:
        """Squared errors of the outputs of all free tensors. Raises PlanError where a kind beside codebooks was not measured."""
        total = 0.0
        for name in self.budget.free(self.inventory):
            fmt = self.budget.choice(self.inventory.tensors[name], width, "", kind).format
            known = self.evidence.tensors[name]
            if kind != CODEBOOK and fmt not in known.errors:
                raise PlanError(
                    f"{name}: the evidence has no error for {fmt}; calibrate with --formats {','.join(self.budget.kinds)}, or plan "
                    "without --formats"
                )
            total += known.energy * known.errors.get(fmt, 0.0)
        return total

    def _has_error(self, name: str, width: int) -> bool:
        return self._format(name, width) in self.evidence.tensors[name].errors

    def _fixed_losses(self) -> tuple[float, list[str]]:
        """Predicted loss of what overrides set, and names of these for which nothing can be predicted."""
        total, unpredicted = 0.0, []
        for unit in self.evidence.units:
            if all(name in self.budget.fixed for name in unit.tensors):
                try:
                    total += self._loss(unit, KEPT_BITS)
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

    def _choices(self, variables: list[_Variable], widths: list[int]) -> dict[str, Choice]:
        made = {
            name: self._choice(name, width)
            for variable, width in zip(variables, widths, strict=True)
            for name in variable.names
        }
        return {**self.budget.fixed, **made}

    def _widths(self, variables: list[_Variable], found: Allocation | None) -> list[int]:
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
