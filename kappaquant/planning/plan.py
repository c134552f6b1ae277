"""The plan: bits and the reason for every tensor, as JSON. Made from headers, a policy and overrides; never from weights."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import Format, TensorInfo, check_group_size
from kappaquant.models.roles import Role, TensorKind, fused_groups, kind_of, known_architecture, name_patterns
from kappaquant.planning import policies
from kappaquant.planning.policies import KEPT, Chooser, check_choice

PLAN_VERSION = 1
POLICIES = ("uniform", "recipe", "kurtosis")
TARGETS = ("vllm",)
"""Engines whose fused layers a plan can be checked against."""
logger = logging.getLogger("kappaquant")


@dataclass(frozen=True)
class Choice:
    """What becomes of one tensor: ``bits`` 2..8 is a codebook, 16 keeps it as it is; ``why`` says who decided."""

    bits: int
    why: str


@dataclass(frozen=True)
class Plan:
    """Bits for every tensor of one source.

    Attributes:
        choices: one entry per tensor, kept ones included.
        group_size: weights per norm, 32 to 256.
        policy: name of the policy that made it.
        inputs: the policy's parameters and the overrides, as plain JSON values.
        warnings: what the maker of the plan should read.
    """

    choices: dict[str, Choice]
    group_size: int
    policy: str
    inputs: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        for name, choice in self.choices.items():
            check_choice(choice.bits, name)

    def bits(self, name: str) -> int:
        """Bits of one tensor, 16 where it is kept."""
        if name not in self.choices:
            raise PlanError(f"{name}: the plan does not name this tensor; make the plan from this very checkpoint")
        return self.choices[name].bits

    def format_of(self, name: str) -> Format | None:
        """Format of one tensor, None where it is kept."""
        bits = self.bits(name)
        return None if bits == KEPT else Format(bits, self.group_size)

    def check(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> None:
        """Raise PlanError, naming the tensors, unless the plan covers exactly these and quantizes only what can be."""
        for names, problem in (
            (self.choices.keys() - tensors.keys(), "the plan names {} the source does not have"),
            (tensors.keys() - self.choices.keys(), "the plan leaves out {} of the source"),
        ):
            if names:
                raise PlanError(f"{_listed(names)}: {problem.format(_count(names))}; make the plan from this source")
        for name, info in tensors.items():
            if self.bits(name) != KEPT and (refuse := kind_of(name, info, config or {}).refuse):
                raise PlanError(f"{name}: the plan gives it {self.bits(name)} bits, but it must be kept (16): {refuse}")

    def to_json(self) -> str:
        """The plan as JSON, one line per tensor, in natural order (layer 2 before layer 10)."""
        head = {
            "plan_version": PLAN_VERSION,
            "policy": self.policy,
            "inputs": self.inputs,
            "group_size": self.group_size,
            "warnings": list(self.warnings),
        }
        lines = [f" {_json(key)}: {_json(value)}," for key, value in head.items()]
        names = sorted(self.choices, key=_natural)
        entries = [f"  {_json(n)}: {_json({'bits': self.bits(n), 'why': self.choices[n].why})}" for n in names]
        return "\n".join(["{", *lines, ' "tensors": {', ",\n".join(entries), " }", "}", ""])

    @classmethod
    def from_json(cls, text: str, label: str = "plan") -> Plan:
        """Read what :meth:`to_json` wrote. Raises PlanError; ``label`` (a file name) opens its message."""
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
        except ValueError as error:
            raise PlanError(f"{label}: not JSON ({error})") from error
        version = data.get("plan_version") if isinstance(data, dict) else None
        if version != PLAN_VERSION:
            raise PlanError(
                f"{label}: plan_version is {version!r}, this version reads {PLAN_VERSION}; make the plan anew"
            )
        shape = {"policy": str, "inputs": dict, "group_size": int, "tensors": dict, "warnings": list}
        for key, kind in shape.items():
            if not isinstance(data.get(key), kind):
                raise PlanError(f"{label}: {key!r} must be a JSON {kind.__name__}, not {data.get(key)!r}")
        choices = {}
        for name, entry in data["tensors"].items():
            if not isinstance(entry, dict) or entry.keys() != {"bits", "why"} or not isinstance(entry["why"], str):
                raise PlanError(f'{label}: {name}: {entry!r}; an entry is {{"bits": 2..8 or 16, "why": "..."}}')
            choices[name] = Choice(entry["bits"], entry["why"])
        return cls(choices, data["group_size"], data["policy"], data["inputs"], tuple(data["warnings"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to ``path``, whole or not at all."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file; raises PlanError naming it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read as a plan ({error})") from error
        return cls.from_json(text, str(path))


def make_plan(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    policy: str = "uniform",
    *,
    bits: int = 3,
    recipe: str = "apex2",
    profile: Mapping[str, float | None] | None = None,
    thresholds: Sequence[float] = (4, 8, 15),
    ladder: Sequence[int] = (3, 4, 5),
    group_size: int = 128,
    overrides: Iterable[tuple[str, int]] = (),
    fuse: bool = False,
    target: str | None = None,
) -> Plan:
    """Choose bits for every tensor.

    Args:
        tensors: every tensor of the source, by name.
        config: its config.json.
        policy: "uniform" (``bits``), "recipe" (``recipe``) or "kurtosis" (``profile``, ``thresholds``, ``ladder``).
        profile: tensor -> excess kurtosis κ, needed for each tensor the kurtosis policy decides.
        group_size: weights per norm, a power of two from 32 to 256.
        overrides: (glob over tensor names, bits) pairs, case-sensitive; the last that matches wins over policy and defaults.
        fuse: raise tensors that serving engines fuse (q/k/v, gate/up, ...) to the most bits among them.
        target: an engine of ``TARGETS``: warn of fused layers whose mixed widths cost it speed.

    Raises:
        PlanError: a parameter out of range, a tensor without κ, an override that matches nothing or a tensor
            that cannot be quantized.
    """
    check_group_size(group_size)
    if target is not None and target not in TARGETS:
        raise PlanError(f"target {target!r} is unknown; the targets are {', '.join(TARGETS)}")
    overrides = list(overrides)
    inputs: dict[str, Any]
    if policy == "uniform":
        choose, inputs = policies.uniform(bits), {"bits": bits}
    elif policy == "recipe":
        choose, inputs = policies.recipe(recipe), {"recipe": recipe}
    elif policy == "kurtosis":
        if profile is None:
            raise PlanError("the kurtosis policy needs a profile of the weights; run scan first and pass what it wrote")
        choose = policies.kurtosis(profile, thresholds, ladder)
        inputs = {"thresholds": list(thresholds), "ladder": list(ladder)}
    else:
        raise PlanError(f"policy {policy!r} is unknown; the policies are {', '.join(POLICIES)}")
    kinds = {name: kind_of(name, info, config) for name, info in tensors.items()}
    forced = _overridden(kinds, overrides)
    choices = {
        name: forced.get(name) or _default(name, kinds[name], tensors[name], group_size, choose) for name in tensors
    }
    if fuse:
        _level(choices, tensors, config)
    inputs |= {"overrides": [list(pair) for pair in overrides], "fuse": fuse}
    warnings = _warnings(kinds, choices, config)
    if target:
        warnings += _mixed(choices, tensors, config, target)
    for warning in warnings:
        logger.warning(warning)
    return Plan(choices, group_size, policy, inputs, warnings)


def overridden(
    plan: Plan, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], overrides: Iterable[tuple[str, int]]
) -> Plan:
    """``plan`` with (glob over tensor names, bits) pairs on top, the last that matches winning; raises PlanError."""
    overrides = list(overrides)
    forced = _overridden({name: kind_of(name, info, config) for name, info in tensors.items()}, overrides)
    added = [*plan.inputs.get("overrides", []), *(list(pair) for pair in overrides)]
    return replace(plan, choices={**plan.choices, **forced}, inputs={**plan.inputs, "overrides": added})


def parse_override(text: str) -> tuple[str, int]:
    """``"PATTERN=BITS"`` as (pattern, bits); raises PlanError."""
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.strip().isdecimal():
        raise PlanError(f"override {text!r}: write PATTERN=BITS, such as '*.o_proj.weight=4'; BITS is 2 to 8, or 16")
    return pattern, int(bits)


def check_legacy(plan: Plan) -> None:
    """Raise PlanError unless tq3_native can hold the plan.

    Its readers infer 2, 3 and 4 bits per tensor from the bytes; 5 to 8 bits they take, once for all, from tq_config.json.
    """
    used: dict[int, str] = {}
    for name, choice in plan.choices.items():
        if choice.bits != KEPT:
            used.setdefault(choice.bits, name)
    if not used:
        raise PlanError("the plan keeps every tensor; tq3_native needs at least one that is quantized")
    if len(used) > 1 and max(used) > 4:
        examples = ", ".join(f"{bits} bits ({used[bits]})" for bits in sorted(used))
        raise PlanError(
            f"{used[max(used)]}: {max(used)} bits beside other widths; tq3_native mixes only 2 to 4 bits, and 5 to 8 must be "
            f"the one width of the whole checkpoint; this plan has {examples}. Use 2 to 4 bits, or the kappaquant format"
        )


def _default(name: str, kind: TensorKind, info: TensorInfo, group_size: int, choose: Chooser) -> Choice:
    if kind.keep:
        return Choice(KEPT, kind.keep)
    if info.shape[-1] < group_size:
        return Choice(
            KEPT, f"input axis {info.shape[-1]} is below the group size {group_size}: padding would waste bytes"
        )
    return Choice(*choose(name, kind))


def _overridden(kinds: Mapping[str, TensorKind], overrides: Iterable[tuple[str, int]]) -> dict[str, Choice]:
    last: dict[str, tuple[str, int]] = {}
    for pattern, bits in overrides:
        check_choice(bits, f"override {pattern!r}")
        matched = [name for name in kinds if fnmatchcase(name, pattern)]
        if not matched:
            raise PlanError(
                f"override {pattern!r} matches no tensor; it is a glob over whole names, such as '*.o_proj.weight'"
            )
        last |= dict.fromkeys(matched, (pattern, bits))
    refused = [name for name, (_, bits) in last.items() if bits != KEPT and kinds[name].refuse]
    if refused:
        pattern, bits = last[refused[0]]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise PlanError(
            f"{refused[0]}{more}: override {pattern!r} cannot give it {bits} bits: {kinds[refused[0]].refuse}; "
            f"narrow the pattern, or keep the tensor with a later override of 16"
        )
    return {name: Choice(bits, f"set by {pattern!r}") for name, (pattern, bits) in last.items()}


def _level(choices: dict[str, Choice], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    for group in fused_groups(tensors, config):
        top = max(group, key=lambda name: choices[name].bits)
        for name in group:
            if choices[name].bits < choices[top].bits:
                choices[name] = Choice(choices[top].bits, f"raised from {choices[name].bits} bits to fuse with {top}")


def _mixed(
    choices: Mapping[str, Choice], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], target: str
) -> tuple[str, ...]:
    """One warning for each kind of fused layer that has mixed widths, with the layers."""
    found: dict[tuple[str, str], list[str]] = {}
    for names in fused_groups(tensors, config):
        kinds = [kind_of(name, tensors[name], config) for name in names]
        widths = ", ".join(map(str, sorted({choices[name].bits for name in names})))
        if "," not in widths:
            continue
        cost = "multiplies once for each width"
        if any(kind.expert is not None for kind in kinds):
            cost = "runs experts of mixed widths without GPU kernels"
        key = f"{_patterns(names)}: {widths} bits", cost
        found.setdefault(key, []).append(str(kinds[0].layer))
    return tuple(
        f"{what} in layers {', '.join(layers)}: {target} fuses these, and {cost}; --fuse-legal makes them equal"
        for (what, cost), layers in found.items()
    )


def _warnings(
    kinds: Mapping[str, TensorKind], choices: Mapping[str, Choice], config: Mapping[str, Any]
) -> tuple[str, ...]:
    kept = [name for name, choice in choices.items() if choice.bits == KEPT]
    if not known_architecture(config):
        what = config.get("model_type") or config.get("architectures")
        return (f"unknown architecture {what!r}: only plain projections were quantized; kept: {_patterns(kept)}",)
    strange = [name for name in kept if kinds[name].role is Role.UNKNOWN]
    if strange:
        return (f"not recognized in a {config.get('model_type')} model, and kept: {_patterns(strange)}",)
    return ()


def _patterns(names: Iterable[str]) -> str:
    return ", ".join(name_patterns(names))


def _count(names: Iterable[str]) -> str:
    count = len(list(names))
    return "1 tensor" if count == 1 else f"{count} tensors"


def _listed(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names, key=_natural)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found
