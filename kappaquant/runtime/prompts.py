"""What a prompt must be like, and where its tokens go in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """Where tokens go in."""
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return device


def check_room(batch: int, max_length: int) -> None:
    """Raise UnsupportedError for a batch without rows, or rows without room for a prompt and an answer."""
    if batch < 1 or max_length < 2:
        raise UnsupportedError(f"batch = {batch}, max_length = {max_length}: must be at least 1 and 2")


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None, batch: int, max_length: int) -> None:
    """Raise UnsupportedError unless prompts are [batch, T], T below ``max_length``, and padded on the left."""
    if input_ids.dim() != 2 or input_ids.shape[0] != batch or not 0 < input_ids.shape[1] < max_length:
        raise UnsupportedError(
            f"prompt of shape {list(input_ids.shape)}: must be [{batch}, T], T from 1 to {max_length - 1}"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise UnsupportedError(
            f"attention_mask of shape {list(attention_mask.shape)}: must be the prompt's {list(input_ids.shape)}"
        )
    seen = attention_mask != 0
    if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise UnsupportedError("attention_mask: padding must be on the left, and no row all padding")


def check_step(length: int, max_length: int) -> None:
    """Raise UnsupportedError where ``length`` tokens leave no room for another, or no prompt was read."""
    if not 0 < length < max_length:
        raise UnsupportedError(f"step after {length} tokens: prefill comes first, and max_length is {max_length}")
