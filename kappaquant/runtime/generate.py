"""Text from a loaded model, piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.models.tokenizer import templated
from kappaquant.runtime.decoding import Decoder, borrowed
from kappaquant.runtime.own_generate import OwnGenerate
from kappaquant.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what tokenizers decode the first bytes of a character to


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue ``prompt``; yields text as soon as it is certain. Closing the iterator stops the model.

    Args:
        temperature: 0 takes the likeliest token each time; else sampling at this temperature.
        top_p: sampling draws from the likeliest tokens that together have this probability.
        top_k: sampling draws from so many of the likeliest tokens; 0 for all.
        min_p: sampling draws from tokens of at least this share of the likeliest one's probability.
        seed: makes sampling repeatable.
        stop: the text ends before the first of these, as it does at an end token of the generation config.

    Raises:
        UnsupportedError: there is no tokenizer, or an option is out of range.
    """
    tokenizer = _check(tokenizer, max_new_tokens, stop)
    sampling = Sampling(temperature, top_p, top_k, min_p, seed)
    return _run(model, tokenizer, tokenizer(prompt, return_tensors="pt"), max_new_tokens, sampling, stop)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Answer a conversation of {"role": ..., "content": ...} messages; options as for ``stream``.

    Raises:
        UnsupportedError: the tokenizer has no chat template.
    """
    tokenizer = _check(tokenizer, max_new_tokens, stop)
    sampling = Sampling(temperature, top_p, top_k, min_p, seed)
    if not tokenizer.chat_template:
        raise UnsupportedError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, so it is a base model; "
            "continue a prompt with generate instead, or add chat_template.jinja"
        )
    inputs = templated(tokenizer, messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return _run(model, tokenizer, inputs, max_new_tokens, sampling, stop)


def tokens(
    decoder: Decoder | OwnGenerate,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sampler: Sampler,
    max_new_tokens: int,
    ends: Collection[int] = (),
) -> Iterator[list[int]]:
    """The next token of every row, again and again; stops once all rows have met an end token, which they go on with.

    On CUDA the step after a token is launched before the token is read, so the GPU works while the caller does.
    """
    ahead = decoder.device.type == "cuda"
    found = sampler(decoder.prefill(input_ids, attention_mask))
    fetched = torch.empty(found.shape, dtype=found.dtype, pin_memory=ahead)
    arrived = torch.cuda.Event() if ahead else None
    ended = [False] * decoder.batch
    for left in reversed(range(max_new_tokens)):
        fetched.copy_(found, non_blocking=True)
        if arrived:
            arrived.record(torch.cuda.current_stream(decoder.device))
            found = sampler(decoder.step(found)) if left else found
            arrived.synchronize()
        row: list[int] = fetched.tolist()
        ended = [was or token in ends for was, token in zip(ended, row, strict=True)]
        yield row
        if all(ended):
            return
        if left and not arrived:
            found = sampler(decoder.step(found))


class Text:
    """Tokens to text: no unfinished character, nothing that a stop string may still begin with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self._tokens: list[int] = []
        self._from = 0  # decoded again each time, for spaces and characters depend on the tokens before
        self._said = 0
        self._held = ""

    def push(self, token: int) -> str:
        """One more token; what is certain now."""
        self._tokens.append(token)
        before, text = self._decode(self._tokens[self._from : self._said]), self._decode(self._tokens[self._from :])
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self._from, self._said = self._said, len(self._tokens)
        return self._release(text[len(before) :])

    def end(self) -> str:
        """No more tokens come: what was held back."""
        before, text = self._decode(self._tokens[self._from : self._said]), self._decode(self._tokens[self._from :])
        rest = self._release(text[len(before) :]) + self._held
        self._held = ""
        return rest

    def _release(self, text: str) -> str:
        text = self._held + text
        cut = min((at for at in map(text.find, self.stop) if at >= 0), default=None)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, some: list[int]) -> str:
        text = self.tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _check(
    tokenizer: PreTrainedTokenizerBase | None, max_new_tokens: int, stop: Sequence[str]
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UnsupportedError(
            "the checkpoint has no tokenizer; copy the original model's tokenizer files to its folder"
        )
    if max_new_tokens < 1:
        raise UnsupportedError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if isinstance(stop, str) or not all(stop):
        raise UnsupportedError(f"stop = {stop!r}: must be a list of strings, none of them empty")
    return tokenizer


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
) -> Iterator[str]:
    input_ids: Tensor = inputs["input_ids"]
    config = getattr(model, "generation_config", None)
    ends = config.eos_token_id if config else None
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    text = Text(tokenizer, stop)
    with borrowed(model, 1, input_ids.shape[1] + max_new_tokens) as decoder:
        sampler = Sampler(sampling, decoder.device)
        for (token,) in tokens(decoder, input_ids, inputs.get("attention_mask"), sampler, max_new_tokens, ends):
            if token in ends:
                break
            if piece := text.push(token):
                yield piece
            if text.stopped:
                return
    if rest := text.end():
        yield rest
