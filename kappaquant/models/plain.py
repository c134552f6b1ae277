"""A folder or repository of plain weights as a model, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.errors import SourceError
from kappaquant.models.skeleton import load_config, meta_model, model_class, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_model(location: str | Path, dtype: torch.dtype | str, device: str) -> PreTrainedModel:
    """The class that config.json names, in evaluation mode. transformers alone would make up what is missing, and leave out the rest.

    Args:
        dtype: "auto" for that of config.json.

    Raises:
        SourceError: a tensor is missing, misshapen or of no use to the class, which is named; or transformers cannot load it.
        UnsupportedError: as ``load_config`` and ``model_class``.
    """
    config = load_config(location)
    kind: Any = model_class(config)
    try:
        model, found = kind.from_pretrained(location, config=config, dtype=dtype, output_loading_info=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as problem:  # of files and configurations that do not fit each other it raises all kinds
        said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SourceError(
            f"{location}: transformers loads no {kind.__name__} of it ({said}); is config.json the one of these weights?"
        ) from None
    strange = place(meta_model(config), found["unexpected_keys"]).unexpected
    for names, what in (
        (sorted(found["missing_keys"]), "needs it, but it is not there"),
        (strange, "has no place for it"),
    ):
        if names:
            more = f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
            raise SourceError(
                f"{location}: {names[0]}: {kind.__name__} {what}{more}; is config.json the one of these weights?"
            )
    plain: PreTrainedModel = model.to(device).eval()
    return plain
