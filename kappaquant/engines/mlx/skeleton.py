"""mlx_lm's model for a checkpoint, still empty, and the place and shape it has for each of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.engines.mlx.architectures import Name, architecture_of, build, is_tied, name_in_mlx
from kappaquant.errors import FormatError


class Skeleton:
    """mlx_lm's model for a config.json.

    Attributes:
        model: its parameters not yet evaluated.
        shapes: of the model's parameters.
        unused: names asked for that the language model has no use for.
        what: what messages call it.

    Raises:
        FormatError: config.json is missing, or mlx_lm cannot read it.
        UnsupportedError: it asks for what mlx_lm's code does not compute.
    """

    def __init__(self, config: dict[str, Any], label: str) -> None:
        if not config:
            raise FormatError(f"{label}: has no config.json; copy the original model's there to load it")
        self.config = config
        self.model = build(config, label)
        self.shapes = {path: tuple(array.shape) for path, array in arrays_of(self.model).items()}
        self.unused: set[str] = set()
        self.what = f"mlx_lm's {type(self.model).__module__.rpartition('.')[2]}"

    def place(self, name: str) -> Name | None:
        """Where a tensor of the checkpoint belongs; None if the language model has no use for it."""
        place = name_in_mlx(name, architecture_of(self.config), is_tied(self.config))
        if place is None:
            self.unused.add(name)
        return place

    def shape(self, place: Name) -> tuple[int, ...] | None:
        """The shape a tensor of that place must have; None if the model has no such parameters."""
        if any(target not in self.shapes for target in place.targets):
            return None
        first = self.shapes[place.targets[0]]
        if not place.of_experts:
            return first
        experts, rows, width = first
        rows *= len(place.targets)
        return (experts, rows, width) if place.expert is None else (rows, width)

    def shapes_of(self, names: Sequence[str]) -> dict[str, tuple[int, ...] | None]:
        """Of tensors the model has a place for; None for those it has no use for."""
        shapes = {}
        for name in names:
            place = self.place(name)
            shape = self.shape(place) if place else None
            if shape or not place:
                shapes[name] = shape
        return shapes


def open_folder(path: str | Path) -> tuple[Checkpoint, Skeleton]:
    """A checkpoint, headers only, and mlx_lm's model for it, which knows the shapes that tq3_native does not store."""
    label = str(Path(path))
    skeleton: Skeleton | None = None

    def shapes(config: dict[str, Any], names: list[str]) -> dict[str, tuple[int, ...] | None]:
        nonlocal skeleton
        skeleton = Skeleton(config, label)
        return skeleton.shapes_of(names)

    checkpoint = open_checkpoint(path, shapes=shapes)
    return checkpoint, skeleton or Skeleton(checkpoint.config, label)


def arrays_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters by their paths."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))
