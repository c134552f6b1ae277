"""Token sequences of unequal length as rectangular batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError

Bos = Literal["auto", "always", "never"]
BOS: tuple[Bos, ...] = get_args(Bos)
"""What windows of a text begin with; see ``opening``."""


def windows(tokenizer: Any, texts: Iterable[str], max_tokens: int = 2048, bos: Bos = "auto") -> list[list[int]]:
    """Token ids of each text, cut into pieces of at most ``max_tokens``; a piece that predicts nothing is dropped.

    Every piece is scored by itself, without the pieces before it, and begins with ``opening(tokenizer, bos)``.
    """
    begin = opening(tokenizer, bos)
    size = max_tokens - len(begin)
    if size < 1 or max_tokens < 2:
        raise UnsupportedError(
            f"max_tokens = {max_tokens}: a window needs at least {max(2, len(begin) + 1)} tokens, one to predict the next"
        )
    before = len(_put_before(tokenizer))
    pieces = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][before:]
        pieces += [begin + ids[start : start + size] for start in range(0, len(ids), size)]
    return [piece for piece in pieces if len(piece) > 1]


def opening(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """Token ids that every window begins with.

    Args:
        bos: "auto" for what the tokenizer itself puts before a text, as models are trained to expect; "always" for its BOS token too
            where it puts none; "never" for nothing.

    Raises:
        UnsupportedError: another ``bos``, or "always" with a tokenizer that has no such token.
    """
    if bos not in BOS:
        raise UnsupportedError(f"bos {bos!r}: must be one of {', '.join(BOS)}")
    if bos == "never":
        return []
    own, token = _put_before(tokenizer), tokenizer.bos_token_id
    if bos == "auto" or token in own:
        return own
    if token is None:
        raise UnsupportedError(
            f"bos 'always': {tokenizer.name_or_path or 'the tokenizer'} has no BOS token; take auto or never"
        )
    return [token, *own]


def _put_before(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before any text."""
    own, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    at = next((i for i in range(len(own) - len(bare) + 1) if own[i : i + len(bare)] == bare), 0)
    return list(own[:at])


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
