"""The plan as data: a format and the reason for every tensor, and its JSON. Never made from weights; no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kappaquant.errors import FormatError, PlanError
from kappaquant.files.documents import write_whole
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupSize, check_group_choice
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.formats.kinds import USUAL, check_kinds, name_of, usual_kind
from kappaquant.formats.registry import format_by_id
from kappaquant.formats.transposed import Transposed
from kappaquant.models.roles import kinds_of

PLAN_VERSION = 2
KEPT = "kept"
"""In place of a format id: the tensor is stored as it is, bit for bit, whatever its dtype."""
_USUAL_GROUP_SIZE = 128


@dataclass(frozen=True)
class Choice:
    """What becomes of one tensor: ``format`` is a format id, or "kept"; ``why`` says who decided."""

    format: str
    why: str


@dataclass(frozen=True)
class Plan:
    """A format for every tensor of one source.

    Attributes:
        choices: one entry per tensor, kept ones included.
        group_size: the group size asked for, 32 to 256, or "auto"; each format says its own.
        policy: name of the policy that made it.
        inputs: the policy's parameters and the overrides, as plain JSON values.
        warnings: what the maker of the plan should read.

    Raises:
        PlanError: an unknown format or group size; names the tensor.
    """

    choices: dict[str, Choice]
    group_size: GroupSize
    policy: str
    inputs: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        check_group_choice(self.group_size)
        for name, choice in self.choices.items():
            format_of(choice, name)

    def choice(self, name: str) -> Choice:
        if name not in self.choices:
            raise PlanError(f"{name}: the plan does not name this tensor; make the plan from this very checkpoint")
        return self.choices[name]

    def format_of(self, name: str) -> Format | None:
        """Format of one tensor, None where it is kept."""
        return format_of(self.choice(name), name)

    def bits(self, name: str) -> int:
        """Bits of one tensor's codes, 16 where it is kept."""
        fmt = self.format_of(name)
        return fmt.bits if fmt else KEPT_BITS

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of formats that it was chosen from, letters of ``formats.kinds``. Raises PlanError where its inputs name others."""
        return check_kinds(self.inputs.get("formats", USUAL))

    def among(self, kinds: Sequence[str]) -> Plan:
        """The same choices, to be changed for formats of these kinds: an override that says bits alone names the kind that it got."""
        if tuple(kinds) == self.kinds:
            return self
        overrides = [
            [pattern, f"{usual_kind(self.kinds, setting, pattern)}{setting}" if setting in BITS else setting]
            for pattern, setting in self.inputs.get("overrides", [])
        ]
        return replace(self, inputs={**self.inputs, "formats": list(kinds), "overrides": overrides})

    @property
    def usual_group_size(self) -> int:
        """What documents that name one group size say where no tensor's format does."""
        return self.group_size if isinstance(self.group_size, int) else _USUAL_GROUP_SIZE

    def kept(self, name: str, why: str) -> Plan:
        """The plan with one more tensor left as it is."""
        return replace(self, choices={**self.choices, name: Choice(KEPT, why)})

    def check(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> None:
        """Raise PlanError, naming the tensors, unless the plan covers exactly these and quantizes only what can be."""
        for names, problem in (
            (self.choices.keys() - tensors.keys(), "the plan names {} the source does not have"),
            (tensors.keys() - self.choices.keys(), "the plan leaves out {} of the source"),
        ):
            if names:
                raise PlanError(f"{_listed(names)}: {problem.format(_count(names))}; make the plan from this source")
        for name, kind in kinds_of(tensors, config or {}).items():
            fmt = self.format_of(name)
            if fmt and kind.refuse:
                raise PlanError(f"{name}: the plan stores it as {fmt.id}, but it must be kept: {kind.refuse}")
            if fmt and fmt.transposed != kind.transposed:
                axes, other = ("in, out", Transposed(fmt)) if kind.transposed else ("out, in", fmt.rowwise)
                raise PlanError(
                    f"{name}: the plan stores it as {fmt.id}, whose groups would run along its outputs: its shape "
                    f"{list(tensors[name].shape)} is [..., {axes}]; give it {other.id}"
                )

    def to_json(self) -> str:
        """The plan as JSON, one line per tensor, in natural order (layer 2 before layer 10)."""
        return self._text(PLAN_VERSION, self.group_size, lambda choice: {"format": choice.format, "why": choice.why})

    def record(self) -> str:
        """The plan as manifests and journals hold it: in version 1 of the JSON, with bits and one group size, where that says it
        all, so that the same plan gives the same bytes in every version of this package; else as ``to_json``."""
        formats = [fmt for name in self.choices if (fmt := self.format_of(name))]
        groups = {fmt.group_size for fmt in formats if isinstance(fmt, CodebookFormat)} or {self.usual_group_size}
        if len(groups) > 1 or not all(isinstance(fmt, CodebookFormat) for fmt in formats):
            return self.to_json()
        return self._text(1, groups.pop(), _entry_of_bits)

    def _text(self, version: int, group_size: GroupSize, entry: Callable[[Choice], dict[str, Any]]) -> str:
        head = {
            "plan_version": version,
            "policy": self.policy,
            "inputs": self.inputs,
            "group_size": group_size,
            "warnings": list(self.warnings),
        }
        lines = [f" {_json(key)}: {_json(value)}," for key, value in head.items()]
        entries = [f"  {_json(n)}: {_json(entry(self.choices[n]))}" for n in sorted(self.choices, key=natural)]
        return "\n".join(["{", *lines, ' "tensors": {', ",\n".join(entries), " }", "}", ""])

    @classmethod
    def from_json(cls, text: str, label: str = "plan") -> Plan:
        """Read what :meth:`to_json` or :meth:`record` wrote. Raises PlanError; ``label`` (a file name) opens its message."""
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
            _json(data).encode()  # NaN, and halves of characters, are not JSON that could be written again
        except (ValueError, RecursionError) as problem:
            raise PlanError(f"{label}: not JSON ({problem})") from problem
        version = data.get("plan_version") if isinstance(data, dict) else None
        if type(version) is not int or version not in (1, PLAN_VERSION):
            raise PlanError(
                f"{label}: plan_version is {version!r}, this version reads 1 and {PLAN_VERSION}; make the plan anew"
            )
        kinds: dict[str, Any] = {"policy": str, "inputs": dict, "tensors": dict, "warnings": list}
        kinds["group_size"] = int if version == 1 else int | str
        for key, kind in kinds.items():
            if not isinstance(data.get(key), kind):
                name = getattr(kind, "__name__", "number, or auto")
                raise PlanError(f"{label}: {key!r} must be a JSON {name}, not {data.get(key)!r}")
        for key in ("overrides", "formats"):
            if not isinstance(data["inputs"].get(key, []), list):
                raise PlanError(f"{label}: the {key} of 'inputs' must be a list, not {data['inputs'][key]!r}")
        try:
            check_group_choice(data["group_size"])
        except PlanError as problem:
            raise PlanError(f"{label}: {problem}") from None
        read = _choice_of_bits if version == 1 else _choice_of_format
        choices = {name: read(entry, data["group_size"], f"{label}: {name}") for name, entry in data["tensors"].items()}
        try:
            return cls(choices, data["group_size"], data["policy"], data["inputs"], tuple(data["warnings"]))
        except PlanError as problem:
            raise PlanError(f"{label}: {problem}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to ``path``, whole or not at all."""
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file; raises PlanError naming it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read as a plan ({error})") from error
        return cls.from_json(text, str(path))


def format_of(choice: Choice, name: str) -> Format | None:
    """The format that a choice names, None for "kept". Raises PlanError, which names the tensor, for an unknown one."""
    if choice.format == KEPT:
        return None
    try:
        return format_by_id(choice.format, name)
    except FormatError as problem:
        raise PlanError(f"{problem}, and {KEPT} for a tensor that is stored as it is") from None


def rank_of(choice: Choice, name: str) -> tuple[int, str]:
    """Bits and short name of what a choice names, groups aside: (3, "k3"), (3, "t3"), (16, "kept"); the higher the less it loses."""
    fmt = format_of(choice, name)
    return (fmt.bits, name_of(fmt)) if fmt else (KEPT_BITS, KEPT)


def check_bits_or_kept(bits: object, where: str) -> None:
    """Raise PlanError unless ``bits`` is 2..8 or 16; ``where`` opens the message."""
    if isinstance(bits, bool) or not isinstance(bits, int) or (bits not in BITS and bits != KEPT_BITS):
        raise PlanError(f"{where}: bits = {bits!r}; allowed are 2 to 8, or 16 to keep the tensor as it is")


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _choice_of_format(entry: Any, group_size: GroupSize, where: str) -> Choice:
    match entry:
        case {"format": str(format_id), "why": str(why)} if len(entry) == 2:
            return Choice(format_id, why)
    raise PlanError(f'{where}: {entry!r}; an entry is {{"format": an id such as "tq4g128" or "{KEPT}", "why": "..."}}')


def _choice_of_bits(entry: Any, group_size: GroupSize, where: str) -> Choice:
    """Of a plan of version 1, which has bits, and one group size for all."""
    match entry:
        case {"bits": bits, "why": str(why)} if len(entry) == 2:
            check_bits_or_kept(bits, where)
            return Choice(KEPT if bits == KEPT_BITS else CodebookFormat(bits, int(group_size)).id, why)
    raise PlanError(f'{where}: {entry!r}; an entry is {{"bits": 2..8 or 16, "why": "..."}}')


def _entry_of_bits(choice: Choice) -> dict[str, Any]:
    fmt = format_of(choice, "")
    return {"bits": fmt.bits if fmt else KEPT_BITS, "why": choice.why}


def _count(names: Iterable[str]) -> str:
    count = len(list(names))
    return "1 tensor" if count == 1 else f"{count} tensors"


def _listed(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names, key=natural)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found
