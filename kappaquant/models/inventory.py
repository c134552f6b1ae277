"""The inventory of a model: its tensors, its config.json, and what each tensor is, computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.architectures.base import Architecture, find
from kappaquant.models.roles import TensorKind, fused_among, kinds_of


@dataclass(frozen=True)
class Inventory:
    """What there is to choose formats for. Everything but the fields is computed when it is first asked for, and kept.

    Attributes:
        tensors: every tensor by name, with its header entry.
        config: the checkpoint's config.json, possibly multimodal.
    """

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @cached_property
    def kinds(self) -> dict[str, TensorKind]:
        """What each tensor is and what may be done with it, in the order of ``tensors``."""
        return kinds_of(self.tensors, self.config)

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Names of the tensors that are stored [..., in, out]."""
        return frozenset(name for name, kind in self.kinds.items() if kind.transposed)

    @cached_property
    def fused(self) -> list[tuple[str, ...]]:
        """Sets of two or more names that serving engines store as one matrix; a name is in one set at most."""
        return fused_among(self.kinds, self.config)

    @cached_property
    def architecture(self) -> Architecture | None:
        """The architecture config.json names; None where it is unknown."""
        return find(self.config)

    @property
    def known(self) -> bool:
        """Whether a table has the architecture; where none has, transformers' class tells, or else names, cautiously."""
        return self.architecture is not None
