"""A checkpoint loaded as another class than the one it was saved from: the same model below, with another head or none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kappaquant.models.skeleton import Layout, meta_model, model_class, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def without_heads(model: PreTrainedModel, layout: Layout, names: Iterable[str]) -> str | None:
    """Take out of ``layout`` what is no fault where ``model`` is of another class than config.json names; returns that class's name.

    None where it is that class.

    No use has such a class, ``AutoModel``'s for one, for the head of the checkpoint's own: tensors that this one holds outside of its
    base model. And it may have a head that the checkpoint has not, such as a classifier's, which transformers initialises, and says
    so; but not the head that predicts tokens, whose text would be noise.
    """
    own = model_class(model.config)
    if own is type(model):
        return None
    saved = meta_model(model.config)
    heads = {name for name, found in place(saved, names).places.items() if not _in_base(saved, found.target)}
    layout.ignored += [name for name in layout.unexpected if name in heads]
    layout.unexpected = [name for name in layout.unexpected if name not in heads]
    predicting = model.get_output_embeddings()
    theirs = {f"{path}." for path, module in model.named_modules() if predicting is not None and module is predicting}
    new = [
        name
        for name in layout.missing
        if not _in_base(model, name) and not any(name.startswith(path) for path in theirs)
    ]
    layout.missing = [name for name in layout.missing if name not in new]
    return own.__name__


def _in_base(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to the model below the heads; all do of a model that has none."""
    prefix = model.base_model_prefix
    return not hasattr(model, prefix) or name.startswith(f"{prefix}.")
