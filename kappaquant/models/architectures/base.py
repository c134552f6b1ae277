"""What one architecture says of itself, and the registry of all of them.

An architecture is one file. In this folder a file gives its architectures as ``ARCHITECTURES``, and the registry finds
it the first time it is asked; anywhere else a call of :func:`register` does.
"""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from types import MappingProxyType
from typing import Any

from kappaquant.errors import RegistrationError
from kappaquant.models import architectures
from kappaquant.models.architectures.patterns import ANYWHERE, MTP_HEADS, STACKED, VISION_LINEAR, VISION_TOWERS
from kappaquant.models.role_defaults import Role


@dataclass(frozen=True)
class Architecture:
    """How one ``model_type`` names its tensors, and what is to be known of them. Equal content is equal.

    Patterns are regular expressions that must match whole; the first that does wins. Tables that families share are in
    ``patterns``.

    Attributes:
        model_type: as config.json gives it.
        classes: names that config.json's ``architectures`` may give where it has no ``model_type``.
        in_layer: pattern of what follows ``layers.N.`` -> role, in the decoder and in an MTP head. A group, at most
            one, is the number of an expert stored by itself.
        anywhere: pattern -> role, tried where no row of ``in_layer`` matches: on what follows ``layers.N.``, or,
            outside of a layer, ``model.`` or the like.
        fused: sets of roles that serving engines store as one matrix; a layer's experts count as one set. A role is in
            one set at most.
        stacked: roles whose tensors hold all experts of a layer, [experts, out, in], unless the name has an expert's
            number. Only these may be quantized under a name that does not end in ``.weight``.
        keep: role -> why policies leave it in 16 bits, in place of the role's default; "" lets policies choose its bits.
        tied_embeddings: whether lm_head is the embedding matrix where config.json does not say.
        vision: names of the modules, at the root or below ``model.``, that hold all that belongs to vision.
        vision_linear: patterns of what follows such a name that are weights of an nn.Linear.
        mtp: names of the modules, likewise, that hold the multi-token-prediction head.
        unpacked_in_vllm: roles whose tensors vLLM's model holds in layers that no quantization may pack.

    Raises:
        RegistrationError: no model_type, a pattern that is no regular expression or has several groups, a role in two
            fused sets.
    """

    model_type: str
    classes: tuple[str, ...]
    in_layer: Mapping[str, Role]
    anywhere: Mapping[str, Role] = field(default_factory=lambda: ANYWHERE)
    fused: tuple[tuple[Role, ...], ...] = ()
    stacked: tuple[Role, ...] = STACKED
    keep: Mapping[Role, str] = field(default_factory=dict)
    tied_embeddings: bool = False
    vision: tuple[str, ...] = VISION_TOWERS
    vision_linear: tuple[str, ...] = VISION_LINEAR
    mtp: tuple[str, ...] = MTP_HEADS
    unpacked_in_vllm: tuple[Role, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_type:
            raise RegistrationError("an architecture without model_type; give the one of its config.json")
        if isinstance(self.classes, str):
            raise RegistrationError(
                f"architecture {self.model_type!r}: classes is {self.classes!r}; give a tuple of names"
            )
        strange = [
            role
            for role in (*self.in_layer.values(), *self.anywhere.values(), *self.keep)
            if not isinstance(role, Role)
        ]
        if strange:
            raise RegistrationError(f"architecture {self.model_type!r}: {strange[0]!r} is no Role")
        for pattern in (*self.in_layer, *self.anywhere, *self.vision_linear):
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise RegistrationError(
                    f"architecture {self.model_type!r}: pattern {pattern!r} is no regular expression ({error}); correct it"
                ) from error
            if groups > 1:
                raise RegistrationError(
                    f"architecture {self.model_type!r}: pattern {pattern!r} has {groups} groups; one may give the "
                    "expert's number, write (?:...) for the others"
                )
        twice = [role for role, sets in Counter(role for roles in self.fused for role in roles).items() if sets > 1]
        if twice:
            raise RegistrationError(
                f"architecture {self.model_type!r}: role {twice[0]} is in two fused sets; make them one, or choose"
            )

    def __hash__(self) -> int:
        return hash(self.model_type)

    @cached_property
    def in_layer_rows(self) -> tuple[tuple[re.Pattern[str], Role], ...]:
        """``in_layer``, compiled."""
        return tuple((re.compile(pattern), role) for pattern, role in self.in_layer.items())

    @cached_property
    def anywhere_rows(self) -> tuple[tuple[re.Pattern[str], Role], ...]:
        """``anywhere``, compiled."""
        return tuple((re.compile(pattern), role) for pattern, role in self.anywhere.items())

    @cached_property
    def vision_prefix(self) -> re.Pattern[str]:
        """Matches the beginning of every name below a tower of ``vision``."""
        return _prefix(self.vision)

    @cached_property
    def mtp_prefix(self) -> re.Pattern[str]:
        """Matches the beginning of every name below a module of ``mtp``."""
        return _prefix(self.mtp)

    @cached_property
    def vision_linear_rows(self) -> tuple[re.Pattern[str], ...]:
        """``vision_linear``, compiled."""
        return tuple(map(re.compile, self.vision_linear))

    @cached_property
    def fused_set(self) -> Mapping[Role, int]:
        """Role -> index of its set in ``fused``."""
        return {role: index for index, roles in enumerate(self.fused) for role in roles}


def register(architecture: Architecture) -> None:
    """Make an architecture known everywhere; once more with the same content does nothing.

    Raises:
        RegistrationError: its ``model_type`` is known already, with other content.
    """
    _add(_registry(), architecture)
    union.cache_clear()


def unregister(model_type: str) -> None:
    """Forget an architecture, so that its ``model_type`` is unknown. Raises RegistrationError where it is so already."""
    if _registry().pop(model_type, None) is None:
        raise RegistrationError(f"architecture {model_type!r} is not registered; there are {', '.join(_registry())}")
    union.cache_clear()


def registered() -> Mapping[str, Architecture]:
    """Every known architecture by model_type: those of this folder, then what was registered since."""
    return MappingProxyType(_registry())


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a config.json, by ``model_type``, else by ``architectures``; None where it is unknown."""
    model_type = config.get("model_type")
    if model_type is not None:
        return _registry().get(model_type)
    named = set(config.get("architectures") or ())
    return next((known for known in _registry().values() if not named.isdisjoint(known.classes)), None)


@cache
def union() -> Architecture:
    """Every pattern of every architecture, by which names of an unknown one are read; reasons to keep are the defaults.

    Where architectures read a name or fuse a role differently, the one registered first wins.
    """
    known = list(_registry().values())
    fused: list[tuple[Role, ...]] = []
    for roles in dict.fromkeys(roles for each in known for roles in each.fused):
        fused.append(tuple(role for role in roles if not any(role in taken for taken in fused)))
    return Architecture(
        model_type="*",
        classes=(),
        in_layer=_first(each.in_layer for each in known),
        anywhere=_first(each.anywhere for each in known),
        fused=tuple(fused),
        stacked=tuple(dict.fromkeys(role for each in known for role in each.stacked)),
        vision=tuple(dict.fromkeys(name for each in known for name in each.vision)),
        vision_linear=tuple(dict.fromkeys(pattern for each in known for pattern in each.vision_linear)),
        mtp=tuple(dict.fromkeys(name for each in known for name in each.mtp)),
        unpacked_in_vllm=tuple(dict.fromkeys(role for each in known for role in each.unpacked_in_vllm)),
    )


@cache
def _registry() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(architectures.__path__, f"{architectures.__name__}."):
        for architecture in getattr(import_module(module.name), "ARCHITECTURES", ()):
            _add(found, architecture)
    return found


def _add(known: dict[str, Architecture], architecture: Architecture) -> None:
    model_type = architecture.model_type
    if known.setdefault(model_type, architecture) != architecture:
        raise RegistrationError(
            f"architecture {model_type!r} is registered already, with other content; unregister that one first, or "
            "register this one under the model_type of its own config.json"
        )


def _prefix(modules: tuple[str, ...]) -> re.Pattern[str]:
    """Matches names below one of these modules, at the root or below ``model.``; nothing where there are none."""
    if not modules:
        return re.compile(r"(?!)")
    return re.compile(rf"(?:model\.)?(?:{'|'.join(map(re.escape, modules))})\.")


def _first(tables: Iterable[Mapping[str, Role]]) -> dict[str, Role]:
    merged: dict[str, Role] = {}
    for table in tables:
        merged = {**merged, **{pattern: role for pattern, role in table.items() if pattern not in merged}}
    return merged
