"""What a tensor is: its role, and what may be done.

By its architecture's patterns over the structural part of its name; where no table has the architecture, by what transformers' class
does with the tensor, and by the patterns of all architectures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import QUANTIZABLE_DTYPES
from kappaquant.models.architectures.base import Architecture, find, registered, union
from kappaquant.models.role_defaults import ROLES, Role, RoleFacts

if TYPE_CHECKING:
    from kappaquant.models.structure import Found

__all__ = [
    "ROLES",
    "Role",
    "RoleFacts",
    "TensorKind",
    "family_of",
    "fused_among",
    "fused_groups",
    "kind_of",
    "kinds_of",
    "known_architecture",
    "layer_of",
    "name_patterns",
    "pattern_of",
    "role_of",
    "tied_embeddings",
]

_TEXT = re.compile(r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?")
_LAYER = re.compile(r"layers\.(\d+)\.")
_TOLD = (Role.ROUTER, Role.EMBEDDING, Role.LM_HEAD)
"""Roles that modules tell better than names."""
_STACKABLE = (Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP, Role.ROUTED_DOWN)
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class TensorKind:
    """What one tensor is.

    Attributes:
        role: its role; VISION and MTP for everything under those towers.
        part: its role inside the tower (an MTP layer's q_proj is ATTENTION_Q); equal to ``role`` elsewhere.
        layer: number of the layer or block it belongs to, in its tower.
        expert: index of the routed expert, for experts stored one by one.
        refuse: why it can never be quantized; empty when an override may.
        keep: why policies leave it at 16 bits; empty when they choose its bits. Never empty where ``refuse`` is not.
        transposed: it is stored [..., in, out], and only transposed formats suit it.
        by_structure: only transformers' class says so: by its name alone it would be kept, or packed along the wrong axis.
    """

    role: Role
    part: Role
    layer: int | None
    expert: int | None
    refuse: str
    keep: str
    transposed: bool = False
    by_structure: bool = False

    def inputs(self, shape: tuple[int, ...]) -> int:
        """Length of the input axis of a matrix, or of stacked ones, of this kind."""
        return shape[-2 if self.transposed else -1]

    @property
    def family(self) -> str:
        return ROLES[self.role].family


class _Match(NamedTuple):
    """What a name alone says; ``packable``: it is a linear weight or experts, by role and ending."""

    role: Role
    part: Role
    layer: int | None
    expert: int | None
    packable: bool


def known_architecture(config: Mapping[str, Any]) -> bool:
    """Whether an architecture is registered for this config.json: by ``model_type``, else by ``architectures``."""
    return find(config) is not None


def tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether lm_head is the embedding matrix itself; where config.json does not say, its architecture does.

    A model_type that is unknown but begins with a known one, such as gemma3n, is taken to tie as that one does.
    """
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    if known := find(config):
        return known.tied_embeddings
    model_type = str(config.get("model_type", ""))
    return any(each.tied_embeddings and model_type.startswith(each.model_type) for each in registered().values())


def kinds_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorKind]:
    """What each tensor of a checkpoint is and what may be done with it, in the order of ``tensors``.

    Where no table has the architecture, transformers' class is built without memory (a few seconds, once for the same tensors).
    """
    if find(config) is not None or not config.get("model_type"):
        return {name: kind_of(name, info, config) for name, info in tensors.items()}
    return dict(_told(json.dumps(config, sort_keys=True), tuple(tensors.items())))


@lru_cache(maxsize=4)
def _told(config: str, tensors: tuple[tuple[str, TensorInfo], ...]) -> Mapping[str, TensorKind]:
    """Kinds of an architecture's tensors that no table has."""
    from kappaquant.models.structure import (
        structure,  # imports transformers, which known architectures need not pay for
    )

    content = json.loads(config)
    found = structure(dict(tensors), content)
    return {name: kind_of(name, info, content, found.get(name)) for name, info in tensors}


def kind_of(name: str, info: TensorInfo, config: Mapping[str, Any], found: Found | None = None) -> TensorKind:
    """What the tensor is and what may be done with it; what is not recognized is ``Role.UNKNOWN`` and kept.

    Args:
        name: parameter name in the checkpoint.
        info: its header entry.
        config: the checkpoint's config.json, possibly multimodal.
        found: what transformers' class makes of it, for an architecture that no table has; without, its name alone counts there.
    """
    known = find(config)
    architecture = known or union()
    role, part, layer, expert, packable = _match(name, architecture)
    transposed = False
    if found is not None and role not in (Role.VISION, Role.MTP):
        if part is Role.UNKNOWN or found.aside or found.role in _TOLD:
            role = part = found.role
        expert = found.expert if expert is None else expert
        packable, transposed = found.packable and ROLES[part].packable, found.transposed
    elif not known and part in architecture.stacked and len(info.shape) == 3:
        # GPT-OSS stores experts [E, in, out] under these very names: groups would run along the wrong axis
        role = part = Role.UNKNOWN
    stacked = part in _STACKABLE and expert is None and (found is not None or part in architecture.stacked)
    refuse = (found.refuse if found else "") or _refusal(info, role, part, stacked, packable)
    if not refuse and part is Role.LM_HEAD and tied_embeddings(config):
        refuse = "lm_head is tied to the embedding matrix, which the model also indexes row by row"
    keep = architecture.keep.get(role, ROLES[role].keep)
    if found is not None and not keep:
        keep = refuse or found.keep
    elif not keep or role is Role.UNKNOWN:
        keep = refuse or (keep if known else _doubt(name, info, role, layer))
    by_structure = found is not None and (transposed or bool(kind_of(name, info, config).keep))
    return TensorKind(role, part, layer, expert, refuse, keep or refuse, transposed, by_structure)


def role_of(name: str, info: TensorInfo, config: Mapping[str, Any]) -> Role:
    """The tensor's role; see :func:`kind_of`."""
    return kind_of(name, info, config).role


def family_of(name: str, info: TensorInfo, config: Mapping[str, Any]) -> str:
    """The family that reports group the tensor under."""
    return kind_of(name, info, config).family


def layer_of(name: str) -> int | None:
    """Number of the layer (or vision block) the tensor belongs to."""
    block = _BLOCK.search(name)
    return int(block[1]) if block else None


def fused_groups(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Sets of tensors that serving engines store as one matrix, so that equal formats keep every loader possible.

    q/k/v, gate/up, GatedDeltaNet's qkv/z and a/b; of experts stored one by one, a layer's gates and ups, and its downs.
    """
    return fused_among(kinds_of(tensors, config), config)


def fused_among(kinds: Mapping[str, TensorKind], config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """:func:`fused_groups` of tensors whose kinds are at hand."""
    set_of = (find(config) or union()).fused_set
    groups: dict[tuple[bool, int | None, int], list[str]] = {}
    for name, kind in kinds.items():
        if kind.part in set_of and kind.role is not Role.VISION:
            groups.setdefault((kind.role is Role.MTP, kind.layer, set_of[kind.part]), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def pattern_of(name: str) -> str:
    """A name with its numbers replaced by ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def name_patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by ``*``, each once with its count: a short list for a message."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = pattern_of(name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [pattern if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items()]


@cache
def _match(name: str, architecture: Architecture) -> _Match:
    """Reads a name once for each architecture: a large model has 60,000, each asked for many times."""
    layer = layer_of(name)
    if vision := architecture.vision_prefix.match(name):
        below = name[vision.end() :]
        linear = any(pattern.fullmatch(below) for pattern in architecture.vision_linear_rows)
        return _Match(Role.VISION, Role.VISION, layer, None, linear)
    mtp = architecture.mtp_prefix.match(name)
    prefix = mtp or _TEXT.match(name)
    rest = name[prefix.end() :] if prefix else name
    in_layer = _LAYER.match(rest)
    tail = rest[in_layer.end() :] if in_layer else rest
    part, expert = _find(tail, architecture.in_layer_rows) if in_layer else (Role.UNKNOWN, None)
    if part is Role.UNKNOWN:
        part, _ = _find(tail, architecture.anywhere_rows)
    if mtp and rest == "fc.weight":
        part = Role.MTP
    packable = ROLES[part].packable and (tail.endswith(".weight") or part in architecture.stacked)
    return _Match(Role.MTP if mtp else part, part, layer, expert, packable)


def _find(tail: str, rows: Iterable[tuple[re.Pattern[str], Role]]) -> tuple[Role, int | None]:
    for pattern, role in rows:
        if found := pattern.fullmatch(tail):
            return role, int(found[1]) if found.lastindex else None
    return Role.UNKNOWN, None


def _refusal(info: TensorInfo, role: Role, part: Role, stacked: bool, packable: bool) -> str:
    """Why no plan may quantize the tensor; empty when one may."""
    ndim = len(info.shape)
    if info.dtype not in QUANTIZABLE_DTYPES:
        return f"dtype {info.dtype}: only {', '.join(QUANTIZABLE_DTYPES)} weights are quantized"
    if info.numel == 0:
        return f"shape {list(info.shape)} holds no elements"
    if not packable:
        what = "part of the vision tower that is no nn.Linear weight" if role is Role.VISION else f"role {part}"
        return f"{what}; only the weights of linear layers and of experts are quantized"
    if ndim != (3 if stacked else 2):
        return f"{ndim}-D shape {list(info.shape)}: only linear weights (2-D) and stacked experts (3-D) are quantized"
    return ""


def _doubt(name: str, info: TensorInfo, role: Role, layer: int | None) -> str:
    """Why a tensor of an unknown architecture is kept; empty for a plain projection inside a numbered layer."""
    if layer is None or min(info.shape) < 128:
        return "unknown architecture: not a large matrix inside a numbered layer"
    if role is Role.UNKNOWN and not re.search(r"_proj\.weight$", name):
        return "unknown architecture: the name is not that of a known linear projection"
    return ""
