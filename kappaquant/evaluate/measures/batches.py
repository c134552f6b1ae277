"""Token sequences of unequal length as rectangular batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError


def windows(tokenizer: Any, texts: Iterable[str], max_tokens: int = 2048) -> list[list[int]]:
    """Token ids of each text, cut into pieces of at most ``max_tokens``; a piece of one token predicts nothing and is dropped.

    Every piece is scored from its own first token, without the pieces before it.
    """
    if max_tokens < 2:
        raise UnsupportedError(f"max_tokens = {max_tokens}: a window needs at least 2 tokens, one to predict the next")
    pieces = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        pieces += [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
    return [piece for piece in pieces if len(piece) > 1]


def by_length(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, whose padded size is at most ``batch_tokens`` (or a single sequence)."""
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batch and (len(batch) + 1) * len(sequences[index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(sequences: Sequence[Sequence[int]], side: Literal["left", "right"], token: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [batch, longest]; the mask is 1 on tokens and 0 on padding."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), token)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, where] = torch.tensor(sequence, dtype=ids.dtype)
        mask[row, where] = 1
    return ids, mask
