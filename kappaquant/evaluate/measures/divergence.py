"""How far a variant's next-token distributions lie from the original's: KL divergence and perplexity over given text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.batches import by_length, pad
from kappaquant.evaluate.measures.intervals import clustered_mean

_LOGITS_BYTES = 1 << 29
_CHUNK = 1 << 24  # logits brought to float32 at a time: 64 MB


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over some sequences, each read from its own first token, which is given and not predicted.

    Attributes:
        value: exp of the mean negative log-likelihood.
        nll: that mean, nats per token; nll_error: its standard error over sequences, None for one sequence.
        tokens: tokens predicted; sequences: pieces of text they stand in.
    """

    value: float
    nll: float
    nll_error: float | None
    tokens: int
    sequences: int


@dataclass(frozen=True)
class Divergence:
    """KL(original || variant) of the next token, in nats, over every predicted token.

    Attributes:
        mean, median, p99, maximum: over tokens.
        mean_error: standard error of the mean over sequences, None for one sequence.
        same_top: share of tokens for which both models think the same next token likeliest.
        perplexity, original_perplexity: of both models on the same tokens.
    """

    mean: float
    mean_error: float | None
    median: float
    p99: float
    maximum: float
    same_top: float
    perplexity: Perplexity
    original_perplexity: Perplexity


def perplexity(model: Any, sequences: Sequence[Sequence[int]], *, max_logits_bytes: int = _LOGITS_BYTES) -> Perplexity:
    """Perplexity of a causal language model over token sequences (see ``windows``).

    Args:
        max_logits_bytes: logits of one forward pass; a sequence that needs more alone gets it.

    Raises:
        UnsupportedError: no sequences, or one of a single token.
    """
    losses: dict[int, Tensor] = {}
    for index, predicted, (logits,) in scored([model], sequences, max_logits_bytes):
        pieces = [_losses(torch.log_softmax(logits[part].float(), -1), predicted[part]) for part in parts(logits)]
        losses[index] = torch.cat(pieces)
    return _perplexity(losses)


def kl_divergence(
    variant: Any, original: Any, sequences: Sequence[Sequence[int]], *, max_logits_bytes: int = _LOGITS_BYTES
) -> Divergence:
    """Compare a model with the original it was made from, token by token, over token sequences.

    Both run on the same batches, in their own dtype and on their own device; log-softmax and divergence are float32.

    Args:
        max_logits_bytes: logits of one forward pass of one model; a sequence that needs more alone gets it.

    Raises:
        UnsupportedError: the vocabularies differ, no sequences, or one of a single token.
    """
    klds: dict[int, Tensor] = {}
    losses: dict[int, Tensor] = {}
    original_losses: dict[int, Tensor] = {}
    agreed = 0
    for index, predicted, (there, here) in scored([original, variant], sequences, max_logits_bytes):
        if there.shape != here.shape:
            raise UnsupportedError(
                f"the variant's vocabulary has {here.shape[-1]} entries, the original's {there.shape[-1]}; "
                "compare a model with the one it was made from"
            )
        klds[index], losses[index], original_losses[index] = torch.empty(3, len(there)).unbind()
        for part in parts(there):
            p = torch.log_softmax(there[part].float(), -1)
            q = torch.log_softmax(here[part].to(p.device).float(), -1)
            klds[index][part] = (p.exp() * (p - q)).sum(-1).cpu()
            losses[index][part] = _losses(q, predicted[part])
            original_losses[index][part] = _losses(p, predicted[part])
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    mean, error = _mean(klds)
    every = torch.cat(list(klds.values())).double().numpy()
    median, p99 = np.quantile(every, [0.5, 0.99]).tolist()
    return Divergence(
        mean, error, median, p99, float(every.max()), agreed / len(every),
        _perplexity(losses), _perplexity(original_losses),
    )  # fmt: skip


@torch.no_grad()
def scored(
    models: Sequence[Any],
    sequences: Sequence[Sequence[int]],
    max_logits_bytes: int = _LOGITS_BYTES,
    batches: Iterable[Sequence[int]] | None = None,
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """(index, its tokens but the first [n - 1], each model's logits for them [n - 1, vocabulary]) of every sequence.

    Batches are padded on the right, where a causal model never looks: positions are as without padding.

    Args:
        batches: indices of sequences that run together; default those of similar length, as ``max_logits_bytes`` allows.
    """
    short = [i for i, sequence in enumerate(sequences) if len(sequence) < 2]
    if short or not sequences:
        what = f"sequence {short[0]} has {len(sequences[short[0]])}" if short else "there is no sequence"
        raise UnsupportedError(f"{what}: every sequence needs at least 2 tokens, one to predict the next")
    row = max(m.config.get_text_config().vocab_size * m.dtype.itemsize for m in models)
    for batch in by_length(sequences, max_logits_bytes // row) if batches is None else batches:
        ids, mask = pad([sequences[i] for i in batch], "right")
        logits = [
            m(input_ids=ids.to(m.device), attention_mask=mask.to(m.device), use_cache=False).logits for m in models
        ]
        for place, index in enumerate(batch):
            n = len(sequences[index])
            yield index, ids[place, 1:n], [each[place, : n - 1] for each in logits]


def parts(logits: Tensor) -> list[slice]:
    """Slices of rows that are brought to float32 at a time."""
    size = max(1, _CHUNK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _losses(log_probabilities: Tensor, predicted: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, predicted.to(log_probabilities.device)[:, None])[:, 0].cpu()


def _mean(values: dict[int, Tensor]) -> tuple[float, float | None]:
    """Mean over tokens and its standard error over sequences."""
    return clustered_mean([v.double().sum().item() for v in values.values()], [len(v) for v in values.values()])


def _perplexity(losses: dict[int, Tensor]) -> Perplexity:
    nll, error = _mean(losses)
    return Perplexity(math.exp(nll), nll, error, sum(map(len, losses.values())), len(losses))
