"""Passes of models over a text: sequences in batches, what is found of each kept on disk, each model loaded alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.engines.transformers.load import load
from kappaquant.errors import SourceError, UnsupportedError
from kappaquant.evaluate.measures.batches import Bos, opening, windows
from kappaquant.evaluate.measures.divergence import scored
from kappaquant.evaluate.measures.logits import Tensors
from kappaquant.evaluate.runs.kept import Kept
from kappaquant.evaluate.runs.pair import Pair
from kappaquant.models.skeleton import load_config
from kappaquant.models.tokenizer import read_tokenizer
from kappaquant.runtime.original import original_model
from kappaquant.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]  # (stage, tokens done, of how many)
Measure = Callable[[int, Tensor, Tensor], Tensors]  # (index of the sequence, logits, the tokens that follow)
Batches = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Passes:
    """The sequences, the batches they run in, and whom to tell."""

    sequences: list[list[int]]
    batches: Batches
    progress: Progress

    def run(
        self, model: PreTrainedModel, kept: Kept, measure: Measure, stage: str, batches: Batches | None = None
    ) -> None:
        """Measure what is missing, in whole batches, so that a resumed run comes to the same numbers."""
        batches = self.batches if batches is None else batches
        todo = [batch for batch in batches if not all(map(kept.has, batch))]
        total = self._tokens(batches)
        done = total - self._tokens(todo)
        self.progress(stage, done, total)
        if todo:
            for index, predicted, (logits,) in scored([model], self.sequences, batches=todo):
                kept.write(index, measure(index, logits, predicted))
                done += len(predicted)
                self.progress(stage, done, total)

    def _tokens(self, batches: Batches) -> int:
        return sum(len(self.sequences[i]) - 1 for batch in batches for i in batch)

    @property
    def other_batches(self) -> Batches:
        """Every sequence alone; if they were alone, each with a neighbour."""
        n = len(self.sequences)
        if any(len(batch) > 1 for batch in self.batches):
            return [[i] for i in range(n)]
        return [[i, (i + 1) % n] for i in range(0, n, 2)]


def read_sequences(
    pair: Pair, text: Path, window: int, tokens: int | None, bos: Bos = "auto"
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Token ids of a text in windows of at most ``window``, its first ``tokens``; and the tokens that each window begins with.

    Those are none of the text's; see ``batches.opening``.

    Raises:
        SourceError: the file cannot be read, or is no UTF-8.
        UnsupportedError: it has fewer than 2 tokens, the window is longer than the model's positions, or the tokenizer has no BOS
            token to begin always with.
    """
    longest = getattr(load_config(pair.source.folder).get_text_config(), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise UnsupportedError(f"window = {window}: {pair.source.label} reads at most {longest} tokens at once")
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as problem:
        raise SourceError(f"{text}: cannot be read ({problem.strerror}); --text takes a plain text file") from None
    except UnicodeDecodeError as problem:
        raise SourceError(f"{text}: is not UTF-8 at byte {problem.start}; --text takes a plain text file") from None
    tokenizer = read_tokenizer(pair.tokenizer)
    begin = opening(tokenizer, bos)
    sequences: list[list[int]] = []
    left = tokens
    for piece in windows(tokenizer, [content], window, bos):
        kept = piece if left is None else piece[: len(begin) + left]
        if len(kept) > max(1, len(begin)):
            sequences.append(kept)
        left = None if left is None else left - (len(kept) - len(begin))
    if not sequences:
        raise UnsupportedError(f"{text}: has fewer than 2 tokens; one is needed to predict the next")
    return sequences, tuple(tokenizer.convert_ids_to_tokens(begin))


def load_original(pair: Pair, dtype: str, device: str) -> PreTrainedModel:
    """The original as published, or in float32."""
    return _load_plain(pair.source, dtype, device)


def load_checkpoint(pair: Pair, dtype: str, device: str, activations: str) -> PreTrainedModel:
    """The checkpoint with packed weights; a plain folder as it is."""
    if not isinstance(pair.checkpoint, Checkpoint):
        return _load_plain(pair.checkpoint, dtype, device)
    wanted = torch.float32 if dtype == "float32" else None
    return load(pair.path, dtype=wanted, device=device, activations=activations)[0]


def _load_plain(source: Source, dtype: str, device: str) -> PreTrainedModel:
    return original_model(source, torch.float32 if dtype == "float32" else "auto").to(device)  # type: ignore[arg-type]


def free() -> None:
    """Return a model's memory after the last name for it is gone; its modules refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
