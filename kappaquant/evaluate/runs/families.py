"""The original with the weights of one tensor family as the checkpoint has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kappaquant.checkpoints import contents
from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.errors import UnsupportedError
from kappaquant.models.skeleton import Place, place
from kappaquant.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_families(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Family -> its quantized parameters; the family of most bytes first."""
    packed = {
        family: [name for name in names if checkpoint.format_of(name) is not None]
        for family, names in contents.families(checkpoint).items()
    }
    return {family: names for family, names in packed.items() if names}


@contextmanager
def replaced(model: PreTrainedModel, checkpoint: Checkpoint, source: Source, names: list[str]) -> Iterator[None]:
    """Within the context the parameters ``names`` of the original hold the checkpoint's dequantized values.

    Tensors are read and copied one at a time, and read from the source again at the end; no second set is held.

    Raises:
        UnsupportedError: the source has no tensor of such a name, or transformers converts it in a way not followed here.
    """
    places = place(model, checkpoint.keys()).places
    used = [name for name in names if name in places]  # the rest is what this model class does not hold, such as MTP
    for name in used:
        if name not in source.tensors or places[name].shape is None:
            raise UnsupportedError(
                f"{name}: cannot be put into a {type(model).__name__} alone (no tensor of that name in {source.label}, or "
                "transformers converts it on loading); leave --by-layer out"
            )
    try:
        _fill(model, used, places, checkpoint.dequantize)
        yield
    finally:
        _fill(model, used, places, lambda name: source.read(name).view(source.tensors[name].shape))


@torch.no_grad()
def _fill(model: PreTrainedModel, names: list[str], places: dict[str, Place], read: Callable[[str], Tensor]) -> None:
    parameters = model.state_dict()
    for name in names:
        found = places[name]
        assert found.shape is not None
        target = parameters[found.target]
        if found.expert is not None:
            target = target[found.expert, found.row : found.row + found.shape[0]]
        target.copy_(read(name).view(target.shape))
