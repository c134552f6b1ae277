"""Exact match: greedy answers to questions, counted right or wrong, with intervals and paired comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.batches import pad
from kappaquant.evaluate.measures.intervals import sign_test, wilson

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """A prompt and the answer that a completion must come to."""

    prompt: str
    answer: Answer


@dataclass(frozen=True)
class ExactMatch:
    """Greedy completions, in the order of the questions, and which of them came to the right answer."""

    completions: tuple[str, ...]
    correct: tuple[bool, ...]

    @property
    def hits(self) -> int:
        return sum(self.correct)

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def share(self) -> float:
        return self.hits / self.n

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the share."""
        return wilson(self.hits, self.n, level)


@dataclass(frozen=True)
class Paired:
    """Two variants on the same questions.

    Attributes:
        both, neither: questions on which they agree; only_first, only_second: answered by one alone.
        p_value: two-sided, of McNemar's exact test on the questions that only one answered.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float


def exact_match(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question[Answer]],
    extract: Callable[[str], Answer | None],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 64,
) -> ExactMatch:
    """Answer every question greedily and compare ``extract(completion)`` with its answer.

    Raises:
        UnsupportedError: no questions, or a prompt without tokens.
    """
    if not questions:
        raise UnsupportedError("exact match needs at least one question")
    completions = complete(
        model, tokenizer, [q.prompt for q in questions], max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    correct = (extract(text) == question.answer for text, question in zip(completions, questions, strict=True))
    return ExactMatch(tuple(completions), tuple(correct))


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 256, batch_size: int = 64
) -> list[str]:
    """Greedy completions of the prompts, in their order, without special tokens."""
    sequences = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if any(not sequence for sequence in sequences):
        raise UnsupportedError(f"prompt {[len(s) for s in sequences].index(0)} has no tokens")
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(sequences[i]))
    for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
        ids, mask = pad([sequences[i] for i in batch], "left", filler)  # on the left, so that all go on from the last
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
        )
        texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            out[index] = text
    return out


def paired(first: ExactMatch, second: ExactMatch) -> Paired:
    """Compare two variants question by question; the same questions in the same order.

    Raises:
        UnsupportedError: they answered different numbers of questions.
    """
    if first.n != second.n:
        raise UnsupportedError(f"{first.n} against {second.n} answers: a paired comparison needs the same questions")
    pairs = list(zip(first.correct, second.correct, strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return Paired(
        pairs.count((True, True)), only_first, only_second, pairs.count((False, False)),
        sign_test(only_first, only_second),
    )  # fmt: skip
