"""How much worse a model gets where some of its tensors are quantized: what ``calibrate`` measured, as data and JSON. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kappaquant.errors import PlanError
from kappaquant.files.documents import read_json, write_whole
from kappaquant.formats.codebook import GroupSize, check_group_choice
from kappaquant.formats.kinds import CODEBOOK, KINDS, USUAL
from kappaquant.models.roles import Role, TensorKind

EVIDENCE_VERSION = 1
SHRINKABLE = (Role.EMBEDDING, Role.LM_HEAD)
"""Roles that other policies keep, and that are measured and may shrink: a tied embedding is half of a small model."""
Report = Callable[[int, int], None]
"""Told of what is done, and of how much there is."""


@dataclass(frozen=True)
class TensorErrors:
    """What a tensor's outputs lose in each format.

    Attributes:
        energy: sum of squares of the outputs, over the tokens that were read; the number of weights where there were no tokens.
        errors: format id -> sum of squared errors of the outputs over ``energy``.
    """

    energy: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Unit:
    """Tensors of one layer and role, which are measured together and get one width together.

    Attributes:
        layer: its number; None outside of numbered layers.
        family: of its role, as reports call it.
        role: value of its ``Role``.
        tensors: their names.
        bits: at which ``kld`` was measured; None where nothing was.
        kld: mean KL divergence (nats a token) of the model with only these quantized from the original; None where it was not measured.
        interval_95: of the mean, over windows.
        tokens: that the poorest of its routed experts saw; None for what every token goes through.
        kind: of the formats in which ``kld`` was measured, a letter of ``formats.kinds``.
    """

    layer: int | None
    family: str
    role: str
    tensors: tuple[str, ...]
    bits: int | None
    kld: float | None
    interval_95: tuple[float, float] | None
    tokens: int | None
    kind: str = CODEBOOK


@dataclass(frozen=True)
class Sensitivities:
    """What planning by measurement needs, and its JSON.

    Attributes:
        kind: "calibration", or "weights" where no tokens were read: errors are then those of weights, and no unit has a ``kld``.
        model, revision, sha256: which model, as calibration text names it.
        text: what is known of the tokens.
        effort: how the tensors of a unit were quantized for its ``kld``: "best" or "calibrated".
        group_size: that was asked for, or "auto".
        kurtosis: tensor -> excess kurtosis κ.
    """

    kind: str
    model: str
    revision: str | None
    sha256: str
    text: dict[str, Any]
    effort: str
    group_size: GroupSize
    units: tuple[Unit, ...]
    tensors: dict[str, TensorErrors]
    kurtosis: dict[str, float | None]

    def loss(self, unit: Unit, formats: Mapping[str, str | None]) -> float:
        """Predicted KL divergence where a unit's tensors are in these formats, None for one that is kept.

        The unit's measured divergence, in proportion to the squared error of its outputs. Without a measured one the error itself,
        relative to the outputs: a number to compare by, no divergence.

        Raises:
            PlanError: a tensor or a format was not measured.
        """
        lost = sum(self._error(name, fmt) for name, fmt in formats.items())
        if unit.kld is None or unit.bits is None:
            return lost / (sum(self.tensors[name].energy for name in unit.tensors) or 1.0)
        base = sum(self._error(name, self.format_at(name, unit.bits, unit.kind)) for name in unit.tensors)
        return unit.kld * lost / base if base else 0.0

    def predicted(self, formats: Mapping[str, str | None]) -> float:
        """Predicted KL divergence of a model whose tensors are in these formats, None for one that is kept: the units' together.

        Raises:
            PlanError: a tensor or a format was not measured.
        """
        return sum(self.loss(unit, {name: formats[name] for name in unit.tensors}) for unit in self.units)

    def _error(self, name: str, fmt: str | None) -> float:
        if fmt is None:
            return 0.0
        if name not in self.tensors:
            raise PlanError(
                f"{name}: the evidence does not have it; calibrate this very model, or set its bits by hand"
            )
        known = self.tensors[name]
        if fmt not in known.errors:
            raise PlanError(
                f"{name}: the evidence has no error for {fmt}, only for {', '.join(known.errors)}; calibrate with this group size, or "
                "set the tensor by hand"
            )
        return known.energy * known.errors[fmt]

    def format_at(self, name: str, bits: int, kind: str) -> str:
        """Id of the format of a kind and so many bits that a tensor's error is known for. Raises PlanError where there is none."""
        found = next(iter(self._known(name, kind, [bits])), None)
        if found is None:
            raise PlanError(
                f"{name}: the evidence has no error at {bits} bits in {KINDS[kind].name}, in which its layer was measured; "
                "calibrate again"
            )
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of formats in which every tensor has an error, letters of ``formats.kinds``; codebooks where there are none such."""
        known = (k for k in KINDS if all(self._known(name, k, KINDS[k].bits) for name in self.tensors))
        return tuple(known) or USUAL

    def check_measured(self, names: Iterable[str], kinds: Sequence[str]) -> None:
        """Raise PlanError, naming the tensor, where one has no error in any format of one of these kinds."""
        for name in names:
            known = [kind for kind in KINDS if self._known(name, kind, KINDS[kind].bits)]
            for kind in kinds:
                if known and kind not in known:
                    raise PlanError(
                        f"{name}: the evidence has no error in {KINDS[kind].name} ({kind}); calibrate with --formats "
                        f"{','.join(kinds)}, or plan with --formats {','.join(known)}"
                    )

    def _known(self, name: str, kind: str, bits: Iterable[int]) -> list[str]:
        """Ids of the formats of a kind and these widths that a tensor's error is known for."""
        prefixes = tuple(f"{KINDS[kind].prefix}{width}g" for width in bits)
        return [fmt for fmt in (self.tensors[name].errors if name in self.tensors else ()) if fmt.startswith(prefixes)]

    def to_json(self) -> str:
        return json.dumps({"evidence_version": EVIDENCE_VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON to ``path``, whole or not at all."""
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read what ``save`` wrote. Raises PlanError, which names the file, and the tensor or unit that has no such number."""
        data = read_json(Path(path), PlanError)
        if data.pop("evidence_version", None) != EVIDENCE_VERSION:
            raise PlanError(f"{path}: no evidence that this version reads ({EVIDENCE_VERSION}); make it with calibrate")
        try:
            units = tuple(_unit(entry) for entry in data.pop("units"))
            tensors = {name: _errors(entry) for name, entry in data.pop("tensors").items()}
            made = cls(**data, units=units, tensors=tensors)
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise PlanError(f"{path}: not evidence as calibrate writes it ({problem!r})") from problem
        made._check(str(path))
        return made

    def _check(self, label: str) -> None:
        try:
            check_group_choice(self.group_size)
        except PlanError as problem:
            raise PlanError(f"{label}: {problem}; calibrate again") from None
        for name, known in self.tensors.items():
            _check_numbers(f"{label}: {name}", [known.energy, *known.errors.values()])
        for unit in self.units:
            where = f"{label}: {unit.family} of layer {unit.layer}"
            _check_numbers(where, [] if unit.kld is None else [unit.kld])
            if unit.kind not in tuple(KINDS):
                raise PlanError(
                    f"{where}: was measured in formats {unit.kind!r}, which this version does not know; calibrate again"
                )
            for name in unit.tensors:
                if name not in self.tensors:
                    raise PlanError(f"{where}: names {name}, of which there are no errors; calibrate again")


def decided(kind: TensorKind) -> bool:
    """Whether plans by sensitivity choose a tensor's bits."""
    return not kind.refuse and (not kind.keep or kind.role in SHRINKABLE)


def units_of(
    kinds: Mapping[str, TensorKind], names: Iterable[str], bits: int | None, kind: str = CODEBOOK
) -> list[Unit]:
    """The units that these tensors make, in the order of their first, not measured yet; to be so in formats of these bits and kind."""
    together: dict[tuple[int | None, Role], list[str]] = {}
    for name in names:
        together.setdefault((kinds[name].layer, kinds[name].role), []).append(name)
    return [
        Unit(layer, kinds[members[0]].family, role.value, tuple(members), bits, None, None, None, kind)
        for (layer, role), members in together.items()
    ]


def _unit(entry: dict[str, Any]) -> Unit:
    interval = entry["interval_95"]
    return Unit(**{**entry, "tensors": tuple(entry["tensors"]), "interval_95": interval and tuple(interval)})


def _errors(entry: dict[str, Any]) -> TensorErrors:
    return TensorErrors(entry["energy"], dict(entry["errors"]))


def _check_numbers(where: str, values: Sequence[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise PlanError(
                f"{where}: {value!r} is no sensitivity; it must be a finite number, zero or more; calibrate again"
            )
