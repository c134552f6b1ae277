"""The yardstick of the tables: one float32 model that takes on each variant's weights, held-out text and problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kappaquant import evaluate
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.documents.evaluation import Measured
from kappaquant.evaluate.measures.batches import by_length
from kappaquant.evaluate.measures.bootstrap import Bootstrap
from kappaquant.evaluate.measures.divergence import parts, scored
from kappaquant.evaluate.measures.intervals import paired_difference
from reference.text import extract_answer, problems, scenes

MAX_NEW_TOKENS = 80  # the longest worked answer takes 61
_BATCH_TOKENS = 4096
_SEED = 7  # of no other measurement here


@dataclass(frozen=True)
class Reading:
    """What a variant made of the text: of every sequence, one value for each predicted token.

    Attributes:
        kld: nats; agreed: 1 where the likeliest token is the original's; loss: negative log-likelihood.
    """

    kld: list[np.ndarray]
    agreed: list[np.ndarray]
    loss: list[np.ndarray]

    def figures(self) -> dict[str, Any]:
        """KLD, agreement and perplexity with 95 % bootstrap intervals over sequences, as JSON values."""
        draws = Bootstrap(len(self.kld))
        found = asdict(draws.divergence(self.kld, self.agreed))
        del found["by_position"]
        return {"kld_nats": found, "perplexity": asdict(draws.perplexity(self.loss))}


def kld_difference(first: Reading, second: Reading) -> Measured:
    """Mean KLD of ``first`` less that of ``second`` on the same tokens, with a paired 95 % bootstrap interval."""
    return Bootstrap(len(first.kld)).mean([a - b for a, b in zip(first.kld, second.kld, strict=True)])


def compared(log_p: Tensor, logits: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """KL(original || model), agreement and loss of every token.

    Args:
        log_p: of the original, [n, vocabulary]; logits: of the model; predicted: [n], the tokens that follow.
    """
    found = []
    for part in parts(logits):
        log_q = torch.log_softmax(logits[part].float(), -1)
        kld = (log_p[part].exp() * (log_p[part] - log_q)).sum(-1)
        if not bool(kld.isfinite().all()):
            raise UnsupportedError("the model's logits hold NaN or infinity, so there is no divergence to measure")
        found.append((kld, (log_p[part].argmax(-1) == log_q.argmax(-1)).byte(), _loss(log_q, predicted[part])))
    columns = zip(("kld", "agreed", "loss"), zip(*found, strict=True), strict=True)
    return {key: torch.cat(each).cpu() for key, each in columns}


def _loss(log_q: Tensor, predicted: Tensor) -> Tensor:
    return -log_q.gather(-1, predicted[:, None])[:, 0]


class TextYardstick:
    """The original in float32, and what it says of the text.

    Args:
        folder: of the original.
        text: its token sequences, made with the original's tokenizer.
        device: where it reads; a GPU rounds float32 products as a CPU does, for TensorFloat-32 is off by default.
    """

    def __init__(self, folder: Path, text: Callable[[Any], list[list[int]]], device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.sequences = text(self.tokenizer)
        self._batches = list(by_length(self.sequences, _BATCH_TOKENS))
        self._log_p: dict[int, Tensor] = {}  # over the whole vocabulary: divergences are exact
        self._loss: dict[int, Tensor] = {}
        for index, predicted, logits in self._scored(self.model):
            self._log_p[index] = torch.log_softmax(logits.float(), -1)
            self._loss[index] = _loss(self._log_p[index], predicted.to(logits.device)).cpu()

    @property
    def tokens(self) -> int:
        """Tokens predicted."""
        return sum(len(sequence) - 1 for sequence in self.sequences)

    def perplexity(self) -> Measured:
        """The original's, with its interval."""
        return Bootstrap(len(self._loss)).perplexity([self._loss[i].numpy() for i in sorted(self._loss)])

    def read(self, tensors: Mapping[str, Tensor], model: Any = None) -> Reading:
        """The text under these weights; tensors that are not named are the original's. ``model``: another to run it."""
        with self._wearing(tensors):
            found = {
                i: compared(self._log_p[i], logits, seen.to(logits.device))
                for i, seen, logits in self._scored(model or self.model)
            }
        columns = {key: [found[i][key].numpy() for i in sorted(found)] for key in ("kld", "agreed", "loss")}
        return Reading(**columns)

    def _scored(self, model: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        for index, predicted, (logits,) in scored([model], self.sequences, batches=self._batches):
            yield index, predicted, logits

    @contextmanager
    def _wearing(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other weights, for a while."""
        held = self.model.state_dict()
        _copy(tensors, held)
        try:
            yield
        finally:
            _copy({name: self._original[name] for name in tensors}, held)


class Yardstick(TextYardstick):
    """The reference model over held-out worked problems and prose, and its answers.

    Args:
        folder: of the original.
        texts: worked problems, and as many scenes of prose.
        asked: problems to answer.
    """

    def __init__(self, folder: Path, texts: int, asked: int) -> None:
        told = problems(_SEED, max(texts, asked))
        self.questions = [evaluate.Question(p.prompt, p.answer) for p in told[:asked]]
        worked = [p.prompt + p.worked for p in told[:texts]]
        super().__init__(folder, lambda tokenizer: evaluate.windows(tokenizer, worked + scenes(_SEED, texts)))

    def answers(self, tensors: Mapping[str, Tensor]) -> evaluate.ExactMatch:
        """The problems, answered greedily under these weights."""
        with self._wearing(tensors):
            return evaluate.exact_match(
                self.model, self.tokenizer, self.questions, extract_answer, max_new_tokens=MAX_NEW_TOKENS
            )


def answered(match: evaluate.ExactMatch, original: evaluate.ExactMatch) -> dict[str, Any]:
    """Exact match with Wilson's interval; paired with the original's answers, the difference with Tango's. JSON values."""
    pair = evaluate.paired(original, match)
    return {
        "correct": match.hits, "of": match.n, "share": match.share, "wilson_95": list(match.interval()),
        "only_original": pair.only_first, "only_variant": pair.only_second, "mcnemar_p": pair.p_value,
        "less_original_95": list(paired_difference(pair.only_second, pair.only_first, match.n)),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most."""
    return {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        into[name].copy_(tensor)
