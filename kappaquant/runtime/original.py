"""A source as a transformers model of plain tensors, however it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.models.plain import plain_model
from kappaquant.models.skeleton import load_config, model_class
from kappaquant.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def original_model(source: Source, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A source as a model on the CPU, in evaluation mode.

    Tensors that are stored quantized are decoded as ``quantize`` reads them, one at a time: so what a checkpoint is compared with is
    what it was made from, and no GPU that multiplies in FP8 or FP4 is needed.

    Args:
        dtype: of the model; "auto" takes the one of config.json.

    Raises:
        UnsupportedError: the source is streamed, or the installed transformers does not know its architecture.
        SourceError: a tensor is missing or of no use to the model's class.
    """
    if source.folder is None:
        raise UnsupportedError(f"{source.label}: a streamed model is never there as a whole; leave out --stream")
    if source.stored_as is None:
        return plain_model(source.folder, dtype, "cpu")
    config = load_config(source.folder)
    cls: Any = model_class(config)
    from transformers import GenerationConfig

    del config.quantization_config  # or transformers would look for codes and scales
    if dtype == "auto":
        dtype = config.dtype or torch.bfloat16
    tensors = {name: _Unread(source, name) for name in source.tensors}
    model = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()
    if (source.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


@dataclass(frozen=True)
class _Unread:
    """A tensor of a source that is read when transformers wants it: as it takes the slices that safetensors hands out."""

    source: Source
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source.read(self.name).view(self.source.tensors[self.name].shape)[index]
