"""Making a plan: defaults, a policy and overrides, from headers and evidence; never from weights. No torch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from kappaquant.errors import BudgetError, PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import AUTO, BITS, GroupSize, check_group_choice, fitting
from kappaquant.formats.entry import KEPT_BITS
from kappaquant.formats.kinds import USUAL, check_kinds, kind_and_bits, usual_kind
from kappaquant.formats.registry import formats
from kappaquant.formats.transposed import MARK, Transposed, fitting_weight
from kappaquant.models.architectures.base import union
from kappaquant.models.inventory import Inventory
from kappaquant.models.roles import Role, name_patterns, pattern_of
from kappaquant.planning.plan import KEPT, Choice, Plan, check_bits_or_kept, format_of, rank_of
from kappaquant.planning.policies.base import Budget, Decision, Evidence, Policy, active_bytes
from kappaquant.planning.policies.registry import policy_by_name
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.planning.sizes import active_shares
from kappaquant.sources.source import SINGLE_NAME

logger = logging.getLogger("kappaquant")

ENGINES = ("vllm",)
"""Engines whose fused layers a plan can be checked against."""
_WORTH_SAYING = 0.001  # share of bytes from which a warning names what is kept
Setting = int | str
"""What an override gives a tensor: bits (2..8, or 16 to keep it), a kind with its bits ("t3"), or a format id."""


def make_plan(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    policy: str | Policy = "uniform",
    *,
    profile: Mapping[str, float | None] | None = None,
    sensitivity: Sensitivities | None = None,
    size: int | None = None,
    active: int | None = None,
    shards: Mapping[str, Mapping[str, TensorInfo]] | None = None,
    group_size: GroupSize = AUTO,
    kinds: Iterable[str] | None = None,
    overrides: Iterable[tuple[str, Setting]] = (),
    fuse: bool = False,
    target: str | None = None,
    **options: Any,
) -> Plan:
    """Choose a format for every tensor.

    Args:
        tensors: every tensor of the source, by name.
        config: its config.json.
        policy: a registered policy, by name with its ``options``: "uniform" (``bits``), "recipe" (``recipe``), "kurtosis"
            (``profile``, ``thresholds``, ``ladder``) or "sensitivity" (``sensitivity``, ``size``); or a policy object.
        profile: tensor -> excess kurtosis κ, needed for each tensor the kurtosis policy decides.
        sensitivity: what ``calibrate`` measured; its κ stand in for a profile.
        size: bytes that the checkpoint's safetensors files may take, for policies that keep to a budget.
        active: bytes of weights that decoding a token may read, for policies that keep to this one too.
        shards: file name -> its tensors, as ``source.shards`` has them; their headers count. One file unless given.
        group_size: weights per norm, a power of two from 32 to 256, or "auto": for each tensor what suits its input axis.
        kinds: of formats to choose from: "k" (codebooks), "t" (trellis codes of 2 to 4 bits), or both: then the one of less error. None
            takes those that the policy does: "sensitivity" all that were measured, others codebooks.
        overrides: (glob over tensor names, setting) pairs, case-sensitive; the last that matches wins over policy and defaults. A setting
            is bits, of the kind of least error; a kind with its bits, such as "t3", whatever the ``kinds``; or a format id.
        fuse: raise tensors that serving engines fuse (q/k/v, gate/up, ...) to the most bits among them.
        target: an engine of ``ENGINES``: warn of fused layers whose mixed widths cost it speed. The sensitivity policy makes them
            equal, and keeps what the engine's model cannot pack.

    Raises:
        PlanError: a parameter out of range or unknown, a tensor without κ, an override that matches nothing or a tensor
            that cannot be quantized.
        BudgetError: no plan keeps to the size, or the largest one takes less.
    """
    check_group_choice(group_size)
    if target is not None and target not in ENGINES:
        raise PlanError(f"target {target!r} is unknown; the targets are {', '.join(ENGINES)}")
    overrides = list(overrides)
    chosen = policy if isinstance(policy, Policy) else policy_by_name(policy, options)
    for what, limit, taken in (("size", size, chosen.takes_size), ("active size", active, chosen.takes_active)):
        if limit is not None and not taken:
            raise PlanError(
                f"{what} {limit}: the {chosen.name} policy keeps to no {what}; leave it out, or take a policy that does, such as "
                "sensitivity (with what calibrate measured)"
            )
    if profile is None and sensitivity is not None:
        profile = sensitivity.kurtosis
    inventory, evidence = Inventory(tensors, config), Evidence(profile, sensitivity)
    kinds = check_kinds(chosen.kinds(evidence) if kinds is None else kinds)
    claimed = frozenset(chosen.claims(inventory, evidence))
    fixed = {n: Choice(KEPT, why) for n in tensors if (why := why_kept(inventory, n, group_size, claimed, target))}
    forced = _overridden(inventory, overrides, group_size, kinds)
    fixed |= forced
    shards = {SINGLE_NAME: tensors} if shards is None else shards
    budget = Budget(
        fixed,
        size,
        active,
        group_size,
        shards,
        frozenset(forced),
        fuse or target is not None,
        inventory.transposed,
        kinds,
    )
    decision = chosen.choose(inventory, evidence, budget)
    if not isinstance(decision, Decision):
        decision = Decision(decision)
    choices = {name: fixed.get(name) or _decided(chosen, decision.choices, name) for name in tensors}
    if fuse:
        _level(choices, inventory)
    _check_budgets(chosen, choices, inventory, budget)
    inputs = {**chosen.inputs(), **decision.inputs}
    inputs |= {name: limit for name, limit in (("size", size), ("active", active)) if limit is not None}
    inputs |= {} if kinds == USUAL else {"formats": list(kinds)}
    inputs |= {"overrides": [list(pair) for pair in overrides], "fuse": fuse} | ({"target": target} if target else {})
    warnings = decision.warnings + _warnings(inventory, choices)
    if target:
        warnings += _mixed(choices, inventory, target)
    for warning in warnings:
        logger.warning(warning)
    return Plan(choices, group_size, chosen.name, inputs, warnings)


def overridden(
    plan: Plan, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], overrides: Iterable[tuple[str, Setting]]
) -> Plan:
    """``plan`` with (glob over tensor names, setting) pairs on top, the last that matches winning; raises PlanError."""
    overrides = list(overrides)
    forced = _overridden(Inventory(tensors, config), overrides, plan.group_size, plan.kinds)
    added = [*plan.inputs.get("overrides", []), *(list(pair) for pair in overrides)]
    return replace(plan, choices={**plan.choices, **forced}, inputs={**plan.inputs, "overrides": added})


def parse_override(text: str) -> tuple[str, Setting]:
    """``"PATTERN=BITS"``, ``"PATTERN=t3"`` or ``"PATTERN=FORMAT"`` as (pattern, setting); raises PlanError."""
    pattern, _, setting = text.rpartition("=")
    setting = setting.strip()
    known = [fmt.id for fmt in formats()]
    if not pattern or not (
        setting.isdecimal() or setting.removesuffix(MARK) in known or kind_and_bits(setting, f"override {text!r}")
    ):
        raise PlanError(
            f"override {text!r}: write PATTERN=BITS, such as '*.o_proj.weight=4'; BITS is 2 to 8, or 16, or with its kind such as t3 "
            f"or k6, or a format id: {', '.join(known)}"
        )
    return pattern, int(setting) if setting.isdecimal() else setting


def why_kept(
    inventory: Inventory, name: str, group_size: GroupSize, claimed: Collection[str] = (), target: str | None = None
) -> str:
    """Why the policy is not asked about a tensor; empty where it is."""
    kind = inventory.kinds[name]
    if kind.keep and (name not in claimed or kind.refuse):
        return kind.keep
    if target and kind.role in (inventory.architecture or union()).unpacked_in_vllm:
        return f"{kind.role}: {target}'s {inventory.config.get('model_type')} model holds it in a layer that cannot be packed"
    if target and kind.by_structure:
        return f"recognized by transformers' class alone: {target}'s {inventory.config.get('model_type')} model may hold it otherwise"
    width = kind.inputs(inventory.tensors[name].shape)
    group = fitting(min(BITS), width, group_size).group_size  # which axes are too short does not depend on the bits
    return f"input axis {width} is below the group size {group}: padding would waste bytes" if width < group else ""


def _decided(policy: Policy, decided: Mapping[str, Choice], name: str) -> Choice:
    if name not in decided:
        raise PlanError(f"{name}: the {policy.name} policy made no choice for it; set it by hand with an override")
    return decided[name]


def _check_budgets(policy: Policy, choices: Mapping[str, Choice], inventory: Inventory, budget: Budget) -> None:
    what = f"the {policy.name} policy's plan"
    if budget.size is not None and (total := budget.file_bytes(choices)) > budget.size:
        raise BudgetError(f"{what} takes {total:,} bytes, more than the {budget.size:,} allowed")
    if budget.active is not None:
        total = active_bytes(choices, inventory, active_shares(inventory.tensors, inventory.config))
        if total > budget.active:
            raise BudgetError(f"{what} reads {total:,} bytes for a token, more than the {budget.active:,} allowed")


def _overridden(
    inventory: Inventory, overrides: Iterable[tuple[str, Setting]], group_size: GroupSize, kinds: Sequence[str]
) -> dict[str, Choice]:
    last: dict[str, tuple[str, Setting]] = {}
    for pattern, setting in overrides:
        where = f"override {pattern!r}"
        if not isinstance(setting, str):
            check_bits_or_kept(setting, where)
        elif not kind_and_bits(setting, where):
            format_of(Choice(setting, ""), where)
        matched = [name for name in inventory.tensors if fnmatchcase(name, pattern)]
        if not matched:
            raise PlanError(
                f"override {pattern!r} matches no tensor; it is a glob over whole names, such as '*.o_proj.weight'"
            )
        last |= dict.fromkeys(matched, (pattern, setting))
    refused = [n for n, (_, setting) in last.items() if setting not in (KEPT_BITS, KEPT) and inventory.kinds[n].refuse]
    if refused:
        pattern, setting = last[refused[0]]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        what = f"{setting} bits" if isinstance(setting, int) else setting
        raise PlanError(
            f"{refused[0]}{more}: override {pattern!r} cannot give it {what}: {inventory.kinds[refused[0]].refuse}; "
            f"narrow the pattern, or keep the tensor with a later override of 16"
        )
    return {
        name: Choice(_format_id(setting, inventory, name, group_size, kinds), f"set by {pattern!r}")
        for name, (pattern, setting) in last.items()
    }


def _format_id(setting: Setting, inventory: Inventory, name: str, group_size: GroupSize, kinds: Sequence[str]) -> str:
    transposed = inventory.kinds[name].transposed
    if setting == KEPT_BITS:
        return KEPT
    named = kind_and_bits(setting, name) if isinstance(setting, str) else (usual_kind(kinds, setting, name), setting)
    if named is None:
        fmt = format_of(Choice(str(setting), ""), name)
        return Transposed(fmt).id if fmt and transposed and not fmt.transposed else str(setting)
    kind, bits = named
    return fitting_weight(bits, inventory.tensors[name].shape, group_size, transposed, kind).id


def _level(choices: dict[str, Choice], inventory: Inventory) -> None:
    ranks = {name: rank_of(choice, name) for name, choice in choices.items()}
    for group in inventory.fused:
        top = max(group, key=lambda name: ranks[name])
        for name in group:
            if ranks[name] < ranks[top]:
                choices[name] = Choice(choices[top].format, f"raised from {ranks[name][1]} to fuse with {top}")


def _mixed(choices: Mapping[str, Choice], inventory: Inventory, target: str) -> tuple[str, ...]:
    """One warning for each kind of fused layer that has mixed widths, or kinds of one width, with the layers."""
    found: dict[tuple[str, str], list[str]] = {}
    for names in inventory.fused:
        kinds = [inventory.kinds[name] for name in names]
        formats = sorted({rank_of(choices[name], name) for name in names})
        if len(formats) < 2:
            continue
        cost = "multiplies once for each"
        if any(kind.expert is not None for kind in kinds):
            cost = "runs mixed experts slowly, once for each"
        key = f"{_patterns(names)}: {', '.join(short for _, short in formats)}", cost
        found.setdefault(key, []).append(str(kinds[0].layer))
    return tuple(
        f"{what} in layers {', '.join(layers)}: {target} fuses these, and {cost}; --fuse-legal makes them equal"
        for (what, cost), layers in found.items()
    )


def _warnings(inventory: Inventory, choices: Mapping[str, Choice]) -> tuple[str, ...]:
    kept = [name for name, choice in choices.items() if choice.format == KEPT]
    config = inventory.config
    if not inventory.known:
        what = config.get("model_type") or config.get("architectures")
        packed, left = _shares(inventory, kept)
        if any(kind.by_structure for kind in inventory.kinds.values()):
            how = f"no table has the architecture {what!r}: transformers' class told what each tensor is"
            return (f"{how}; {packed}; kept: {left}",)
        how = f"unknown architecture {what!r}: only plain projections were quantized"
        return (f"{how}; {packed}; kept: {_patterns(kept)}",)
    strange = [name for name in kept if inventory.kinds[name].role is Role.UNKNOWN]
    if strange:
        return (f"not recognized in a {config.get('model_type')} model, and kept: {_patterns(strange)}",)
    return ()


def _shares(inventory: Inventory, kept: Iterable[str]) -> tuple[str, str]:
    """What is packed of all bytes beside embeddings, head and what no text reads, and what takes the most of the rest."""
    beside = (Role.EMBEDDING, Role.LM_HEAD, Role.VISION, Role.TOWER, Role.MTP)
    sizes = {n: info.nbytes for n, info in inventory.tensors.items() if inventory.kinds[n].role not in beside}
    total = sum(sizes.values()) or 1
    left: dict[str, int] = {}
    for name in kept:
        if name in sizes:
            left[pattern_of(name)] = left.get(pattern_of(name), 0) + sizes[name]
    ordered = sorted(left.items(), key=lambda item: -item[1])
    shown = [f"{pattern} {size / total:.1%}" for pattern, size in ordered if size / total >= _WORTH_SAYING]
    rest = f" and {len(ordered) - len(shown)} kinds of small ones" if len(ordered) > len(shown) else ""
    packed = f"{1 - sum(left.values()) / total:.1%} of the bytes are packed, embeddings, head and towers aside"
    return packed, f"{', '.join(shown) or 'none large'}{rest}"


def _patterns(names: Iterable[str]) -> str:
    return ", ".join(name_patterns(names))
