"""How much of a model a plan packs, and what the rest is, in words: a plan that keeps most of it makes nothing small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.inventory import Inventory
from kappaquant.planning.plan import KEPT, Plan

_LEAST = 0.5
_FAMILIES = 3  # that are named


def packed_share(plan: Plan, tensors: Mapping[str, TensorInfo]) -> float:
    """Bytes of the source's tensors that the plan packs, as a share of them all; 0 where there are none."""
    total = sum(info.nbytes for info in tensors.values())
    return sum(info.nbytes for name, info in tensors.items() if plan.choice(name).format != KEPT) / (total or 1)


def mostly_kept(plan: Plan, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    """What to say of a plan that packs less than half of the source's bytes; empty of others.

    Names the largest families that are kept with their share of all bytes, and of each its largest tensor and why that is kept.
    """
    share = packed_share(plan, tensors)
    if share >= _LEAST:
        return ""
    total = sum(info.nbytes for info in tensors.values()) or 1
    kinds = Inventory(tensors, config).kinds
    families: defaultdict[str, list[str]] = defaultdict(list)
    for name in tensors:
        if plan.choice(name).format == KEPT:
            families[kinds[name].family].append(name)
    sizes = {family: sum(tensors[name].nbytes for name in names) for family, names in families.items()}
    named = sorted(families, key=lambda family: -sizes[family])[:_FAMILIES]
    largest = {family: max(families[family], key=lambda name: tensors[name].nbytes) for family in named}
    kept = "; ".join(
        f"{family} {sizes[family] / total:.1%} ({largest[family]}: {plan.choice(largest[family]).why})"
        for family in named
    )
    return f"packs {share:.1%} of the bytes, and keeps {kept}"
