"""The original's next-token distributions in little space, and the divergence of another model's from them."""

from __future__ import annotations

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.divergence import parts

Tensors = dict[str, Tensor]


def keep_top(logits: Tensor, predicted: Tensor, k: int) -> Tensors:
    """The k likeliest tokens and their log-probabilities, and how much lies in the rest.

    Args:
        logits: [n, vocabulary], any float dtype; read in float32, some rows at a time.
        predicted: [n], the tokens that follow.

    Returns:
        ids int32 [n, k], log_p float32 [n, k], log_rest float32 [n] (-inf if k is the vocabulary), likeliest int32 [n],
        loss float32 [n] (negative log-probability of ``predicted``).
    """
    pieces = []
    for part in parts(logits):
        log_p = _log_softmax(logits[part])
        values, ids = log_p.topk(min(k, log_p.shape[-1]))
        pieces.append((ids.int(), values, _log_rest(log_p, ids), log_p.argmax(-1).int(), _loss(log_p, predicted[part])))
    names = ("ids", "log_p", "log_rest", "likeliest", "loss")
    return {name: torch.cat(each).cpu() for name, each in zip(names, zip(*pieces, strict=True), strict=True)}


def diverge(top: Tensors, logits: Tensor, predicted: Tensor) -> Tensors:
    """KL(original || model) of every token, from what ``keep_top`` kept of the original.

    Σ p (log p − log q) over the kept tokens, and the rest as one more outcome. That is the divergence itself if all tokens
    were kept; otherwise it is at most the divergence, for merging outcomes cannot increase it (data-processing inequality,
    Cover and Thomas, Elements of Information Theory, 2.8).

    Returns:
        kld float32 [n] in nats, agreed uint8 [n] (the same likeliest token), loss float32 [n].

    Raises:
        UnsupportedError: the logits hold NaN, or the divergence is infinite.
    """
    pieces = []
    for part in parts(logits):
        log_q = _log_softmax(logits[part])
        kept = {name: tensor[part].to(log_q.device) for name, tensor in top.items()}
        ids = kept["ids"].long()
        kld = _terms(kept["log_p"], log_q.gather(-1, ids)).sum(-1) + _terms(kept["log_rest"], _log_rest(log_q, ids))
        if not bool(kld.isfinite().all()):
            raise UnsupportedError(
                "the model thinks a token impossible that the original does not: KL divergence is infinite"
            )
        pieces.append((kld, (log_q.argmax(-1) == kept["likeliest"]).byte(), _loss(log_q, predicted[part])))
    return {
        n: torch.cat(each).cpu() for n, each in zip(("kld", "agreed", "loss"), zip(*pieces, strict=True), strict=True)
    }


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p − log q), 0 where p is 0."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))


def _log_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """log of the probability outside ``ids``, summed there: 1 − Σ p would lose its digits."""
    return log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    found = torch.log_softmax(logits.float(), -1)
    if bool(found.isnan().any()):
        raise UnsupportedError(
            "the model's logits hold NaN or infinity: there is nothing to compare; try --dtype float32"
        )
    return found


def _loss(log_p: Tensor, predicted: Tensor) -> Tensor:
    return -log_p.gather(-1, predicted.to(log_p.device)[:, None])[:, 0]
