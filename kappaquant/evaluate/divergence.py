"""How far a variant's next-token distributions lie from the original's: KL divergence and perplexity over given text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.batches import by_length, pad
from kappaquant.evaluate.intervals import clustered_mean

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

    @property
    def tokens(self) -> int:
        return self.perplexity.tokens


def perplexity(model: Any, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 4096) -> Perplexity:
    """Perplexity of a causal language model over token sequences (see ``batches.windows``).

    Args:
        batch_tokens: tokens of one forward pass, padding included; with the vocabulary it bounds the memory for logits.

    Raises:
        UnsupportedError: no sequence has two tokens.
    """
    _check(sequences)
    losses: list[Tensor] = [torch.empty(0)] * len(sequences)
    for batch in by_length(sequences, batch_tokens):
        ids, mask = pad([sequences[i] for i in batch], "right")
        logits = _logits(model, ids, mask)
        found = torch.empty(len(logits))
        targets = _predicted(ids[:, 1:], mask)
        for part in _parts(logits):
            found[part] = _losses(torch.log_softmax(logits[part].float(), -1), targets[part])
        _share_out(losses, batch, found, sequences)
    return _perplexity(losses)


def divergence(
    variant: Any, original: Any, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 4096
) -> Divergence:
    """Compare a model with the original it was made from, token by token, over token sequences.

    Both run on the same padded batches, in their own dtype and on their own device; log-softmax and divergence are float32.

    Args:
        batch_tokens: tokens of one forward pass, padding included; with the vocabulary it bounds the memory for logits.

    Raises:
        UnsupportedError: the vocabularies differ, or no sequence has two tokens.
    """
    _check(sequences)
    empty = torch.empty(0)
    klds, losses, original_losses = ([empty] * len(sequences) for _ in range(3))
    agreed = 0
    for batch in by_length(sequences, batch_tokens):
        ids, mask = pad([sequences[i] for i in batch], "right")
        there, here = _logits(original, ids, mask), _logits(variant, ids, mask)
        if there.shape != here.shape:
            raise UnsupportedError(
                f"the variant's vocabulary has {here.shape[-1]} entries, the original's {there.shape[-1]}; "
                "compare a model with the one it was made from"
            )
        targets = _predicted(ids[:, 1:], mask)
        kld, loss, original_loss = torch.empty(3, len(here)).unbind()
        for part in _parts(here):
            p = torch.log_softmax(there[part].float(), -1)
            q = torch.log_softmax(here[part].to(p.device).float(), -1)
            kld[part] = (p.exp() * (p - q)).sum(-1).cpu()
            loss[part], original_loss[part] = _losses(q, targets[part]), _losses(p, targets[part])
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        for values, found in ((klds, kld), (losses, loss), (original_losses, original_loss)):
            _share_out(values, batch, found, sequences)
    every = torch.cat(klds).double()
    mean, error = clustered_mean([k.double().sum().item() for k in klds], [len(k) for k in klds])
    median, p99 = torch.quantile(every, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return Divergence(
        mean, error, median, p99, every.max().item(), agreed / len(every),
        _perplexity(losses), _perplexity(original_losses),
    )  # fmt: skip


def _check(sequences: Sequence[Sequence[int]]) -> None:
    short = [i for i, sequence in enumerate(sequences) if len(sequence) < 2]
    if short or not sequences:
        what = f"sequence {short[0]} has {len(sequences[short[0]])}" if short else "there is none"
        raise UnsupportedError(f"every sequence needs at least 2 tokens to predict one; {what}")


@torch.no_grad()
def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the predicted tokens of a batch padded on the right, [tokens, vocabulary], in the model's dtype.

    On the right, since a causal model never looks there: positions are as without padding.
    """
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return logits[:, :-1][(mask[:, 1:] == 1).to(logits.device)]


def _predicted(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask[:, 1:] == 1]


def _parts(logits: Tensor) -> list[slice]:
    size = max(1, _CHUNK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets.to(log_probabilities.device)[:, None])[:, 0].cpu()


def _share_out(values: list[Tensor], batch: Sequence[int], found: Tensor, sequences: Sequence[Sequence[int]]) -> None:
    """Give each sequence of a batch the values of its own predicted tokens."""
    for index, piece in zip(batch, found.split([len(sequences[i]) - 1 for i in batch]), strict=True):
        values[index] = piece


def _perplexity(losses: Sequence[Tensor]) -> Perplexity:
    counts = [len(loss) for loss in losses]
    nll, error = clustered_mean([loss.double().sum().item() for loss in losses], counts)
    return Perplexity(math.exp(nll), nll, error, sum(counts), len(counts))
