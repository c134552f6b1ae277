"""What the explorer's page knows, as plain JSON values: units by format, what is fixed, points beside the curve. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from typing import Any

from kappaquant.errors import PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.formats.kinds import KINDS, USUAL
from kappaquant.formats.transposed import fitting_weight
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import Role
from kappaquant.planning.make import why_kept
from kappaquant.planning.plan import KEPT, Choice, Plan, natural
from kappaquant.planning.policies.base import Budget, Decision, Evidence, Policy, choice_bytes
from kappaquant.planning.policies.recipe import RECIPES, Recipe
from kappaquant.planning.policies.uniform import Uniform
from kappaquant.planning.sensitivity import Sensitivities, Unit
from kappaquant.planning.sizes import active_shares

_MARKED: dict[str, Policy] = {
    "uniform 3": Uniform(3),
    "uniform 4": Uniform(4),
    **{name: Recipe(name) for name in RECIPES},
}


@dataclass(frozen=True)
class Mark:
    """A point beside the curve.

    Attributes:
        name: what the page calls it.
        nbytes: of its tensors, or of the weight files of a measured checkpoint.
        loss: KL divergence (nats a token) that is predicted, or was measured.
        interval_95: of the measured one.
        measured: whether it is a checkpoint that was evaluated.
    """

    name: str
    nbytes: int
    loss: float
    interval_95: tuple[float, float] | None = None
    measured: bool = False


@dataclass(frozen=True)
class Contents:
    """Gathers what the page knows of one source.

    Attributes:
        plan: what gives group size, kinds of formats, overrides, whether fused layers share a width, and the engine it is for; the page
            starts at its size.
        tensors: every tensor of the source; config: its config.json.
        evidence: whose units become free to choose; what is in none of them stays as it is.
    """

    plan: Plan
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    evidence: Sensitivities

    def gathered(self, measured: Iterable[Mark] = ()) -> dict[str, Any]:
        """Everything, as JSON values; the same for the same input.

        Raises:
            PlanError: evidence of another model, one that lacks a tensor, or every format or a kind of formats of it.
        """
        inventory = self._inventory
        units, fixed = self._free(inventory), self._fixed(inventory)
        self.evidence.check_measured((name for _, free in units for name in free), self.plan.kinds)
        names = sorted(self.tensors, key=natural)
        number = {name: position for position, name in enumerate(names)}
        shares = active_shares(self.tensors, self.config)
        marks = [*self._recipes(inventory, fixed), *measured]
        return {
            "model": self.evidence.model,
            "kind": self.evidence.kind,
            "divergence": all(unit.kld is not None for unit, _ in units),
            "text": self.evidence.text,
            "effort": self.evidence.effort,
            "evidence": {"kind": self.evidence.kind, "model": self.evidence.model, "sha256": self.evidence.sha256},
            "group_size": self.plan.group_size,
            "kinds": list(self.plan.kinds),
            "overrides": self._overrides(),
            "fuse": bool(self.plan.inputs.get("fuse", False)),
            "target": self._target,
            "warnings": list(self.plan.warnings),
            "weights": sum(info.numel for info in self.tensors.values()),
            "names": names,
            "units": [
                self._unit(unit, free, number, shares) | {"block": block}
                for (unit, free), block in zip(units, self._blocks(units, inventory), strict=True)
            ],
            "fixed": self._fixed_rows(fixed, inventory, number, shares),
            "start": sum(choice_bytes(self.plan.choice(name), info) for name, info in self.tensors.items()),
            "marks": [asdict(mark) for mark in sorted(marks, key=lambda mark: (mark.nbytes, mark.name))],
        }

    @cached_property
    def _inventory(self) -> Inventory:
        return Inventory(self.tensors, self.config)

    def _overrides(self) -> list[Any]:
        return list(self.plan.inputs.get("overrides", []))

    @property
    def _target(self) -> str | None:
        """The engine that the plan is for, whose fused layers get one width, and which cannot pack everything."""
        return self.plan.inputs.get("target")

    def _kept_for_target(self, inventory: Inventory, name: str) -> bool:
        return bool(self._target and why_kept(inventory, name, self.plan.group_size, (name,), self._target))

    def _set_by_hand(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern, _ in self._overrides())

    def _free(self, inventory: Inventory) -> list[tuple[Unit, tuple[str, ...]]]:
        """Units, and those of their tensors that may be chosen for; a prediction is a sum over tensors, so the others do not matter."""
        free = []
        for unit in self.evidence.units:
            for name in unit.tensors:
                if name not in self.tensors:
                    raise PlanError(
                        f"{name}: the evidence names it, but the source has no such tensor; calibrate this very model"
                    )
            names = tuple(
                name
                for name in unit.tensors
                if not (
                    inventory.kinds[name].refuse or self._set_by_hand(name) or self._kept_for_target(inventory, name)
                )
            )
            if names:
                free.append((unit, names))
        if not free:
            raise PlanError("the evidence has no unit of tensors that could be chosen for; calibrate this very model")
        order = {str(role): place for place, role in enumerate(Role)}
        return sorted(free, key=lambda pair: (order.get(pair[0].role, len(order)), pair[0].layer or 0))

    def _fixed(self, inventory: Inventory) -> dict[str, Choice]:
        measured = {name for unit in self.evidence.units for name in unit.tensors}
        fixed = {}
        for name in self.tensors:
            if self._set_by_hand(name):
                fixed[name] = self.plan.choice(name)
            elif name not in measured or inventory.kinds[name].refuse or self._kept_for_target(inventory, name):
                claimed = (name,) if name in measured else ()
                why = why_kept(inventory, name, self.plan.group_size, claimed, self._target)
                if not why:
                    raise PlanError(
                        f"{name}: the evidence does not have it; calibrate this very model, or set its bits by hand"
                    )
                fixed[name] = Choice(KEPT, why)
        return fixed

    def _blocks(self, units: list[tuple[Unit, tuple[str, ...]]], inventory: Inventory) -> list[int]:
        """For each unit the number of the block that shares its width: its own, or that of a fused layer."""
        of_tensor = {name: number for number, (_, names) in enumerate(units) for name in names}
        block = list(range(len(units)))
        for group in inventory.fused if self._target or self.plan.inputs.get("fuse") else ():
            joined = {block[of_tensor[name]] for name in group if name in of_tensor}
            block = [min(joined) if number in joined else number for number in block]
        return block

    def _unit(
        self, unit: Unit, free: tuple[str, ...], number: Mapping[str, int], shares: Mapping[str, Fraction]
    ) -> dict[str, Any]:
        every = sorted((bits, kind) for kind in self.plan.kinds for bits in KINDS[kind].bits)
        formats = {width: self._formats(free, *width) for width in (*every, (KEPT_BITS, ""))}
        known = [width for width, ids in formats.items() if all(self._has_error(*pair) for pair in ids.items())]
        if len(known) == 1:
            self.evidence.loss(unit, formats[every[0]])  # says which format is missing
        sizes = [
            {name: choice_bytes(Choice(fmt or KEPT, ""), self.tensors[name]) for name, fmt in formats[width].items()}
            for width in known
        ]
        rows: dict[tuple[str, ...], list[int]] = {}
        for name in free:
            rows.setdefault(tuple(formats[width][name] or KEPT for width in known), []).append(number[name])
        kurtosis = [k for name in free if (k := self.evidence.kurtosis.get(name)) is not None]
        return {
            "layer": unit.layer,
            "family": unit.family,
            "role": unit.role,
            "kurtosis": max(kurtosis, default=None),
            "kld": unit.kld,
            "interval_95": unit.interval_95,
            "measured_at": None if unit.bits is None else self._name(unit.bits, unit.kind),
            "widths": [bits for bits, _ in known],
            "formats": [self._name(*width) for width in known],
            "bytes": [sum(size.values()) for size in sizes],
            "active": [float(sum(nbytes * shares[name] for name, nbytes in size.items())) for size in sizes],
            "loss": [self.evidence.loss(unit, formats[width]) for width in known],
            "tensors": [{"formats": list(ids), "names": names} for ids, names in rows.items()],
        }

    def _name(self, bits: int, kind: str) -> str:
        """What the page calls a width of a kind: its bits, and the letter before them where there is more than the usual kind."""
        return f"{kind if self.plan.kinds != USUAL else ''}{bits}"

    def _formats(self, names: Iterable[str], bits: int, kind: str) -> dict[str, str | None]:
        """Format id by tensor at a width of a kind, None for one that is kept."""
        if bits == KEPT_BITS:
            return dict.fromkeys(names)
        kinds, group_size = self._inventory.kinds, self.plan.group_size
        return {
            name: fitting_weight(bits, self.tensors[name].shape, group_size, kinds[name].transposed, kind).id
            for name in names
        }

    def _has_error(self, name: str, fmt: str | None) -> bool:
        known = self.evidence.tensors.get(name)
        return fmt is None or (known is not None and fmt in known.errors)

    def _fixed_rows(
        self,
        fixed: Mapping[str, Choice],
        inventory: Inventory,
        number: Mapping[str, int],
        shares: Mapping[str, Fraction],
    ) -> list[dict[str, Any]]:
        """One row for each family, format and reason."""
        rows: dict[tuple[str, str, str], list[str]] = {}
        for name, choice in fixed.items():
            rows.setdefault((inventory.kinds[name].family, choice.format, choice.why), []).append(name)
        return [
            {
                "family": family,
                "format": fmt,
                "why": why,
                "names": [number[name] for name in names],
                "bytes": sum(choice_bytes(fixed[name], self.tensors[name]) for name in names),
                "active": float(sum(choice_bytes(fixed[name], self.tensors[name]) * shares[name] for name in names)),
                "loss": self._predicted({name: fixed[name] for name in names}),
            }
            for (family, fmt, why), names in sorted(rows.items())
        ]

    def _predicted(self, choices: Mapping[str, Choice]) -> float:
        """Loss of these tensors as chosen; of what was not measured nothing is known, and nothing is added."""
        lost = 0.0
        for unit in self.evidence.units:
            formats = {name: choices[name].format for name in unit.tensors if name in choices}
            packed = {name: fmt for name, fmt in formats.items() if fmt != KEPT and self._has_error(name, fmt)}
            if packed:
                lost += self.evidence.loss(unit, packed)
        return lost

    def _recipes(self, inventory: Inventory, fixed: Mapping[str, Choice]) -> list[Mark]:
        """What fixed policies make of the same source: their bytes, and what is predicted of them."""
        group_size = self.plan.group_size
        kept = {name: Choice(KEPT, why) for name in self.tensors if (why := why_kept(inventory, name, group_size))}
        by_hand = {name: fixed[name] for name in fixed if self._set_by_hand(name)}
        budget = Budget(
            {**kept, **by_hand}, group_size=group_size, transposed=inventory.transposed, kinds=self.plan.kinds
        )
        marks = []
        for name, policy in _MARKED.items():
            decision = policy.choose(inventory, Evidence(), budget)
            decided = decision.choices if isinstance(decision, Decision) else decision
            choices = {**decided, **budget.fixed}
            packed = {each: c.format for each, c in choices.items() if c.format != KEPT and not self._set_by_hand(each)}
            if all(self._has_error(*pair) for pair in packed.items()):
                nbytes = sum(choice_bytes(choices[each], info) for each, info in self.tensors.items())
                marks.append(Mark(name, nbytes, self._predicted(choices)))
        return marks
