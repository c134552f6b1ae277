"""Text from a loaded model, piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.errors import UnsupportedError

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
    seed: int | None = None,
) -> Iterator[str]:
    """Continue ``prompt``; yields text as soon as it is certain. Closing the iterator stops the model.

    Args:
        temperature: 0 takes the likeliest token each time; else sampling at this temperature.
        top_p: sampling draws from the likeliest tokens that together have this probability.
        seed: makes sampling repeatable.

    Raises:
        UnsupportedError: there is no tokenizer, or an option is out of range.
    """
    tokenizer = _check(tokenizer, max_new_tokens, temperature, top_p)
    inputs = dict(tokenizer(prompt, return_tensors="pt"))
    return _run(model, tokenizer, inputs, max_new_tokens, temperature, top_p, seed)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Answer a conversation of {"role": ..., "content": ...} messages; options as for ``stream``.

    Raises:
        UnsupportedError: the tokenizer has no chat template.
    """
    tokenizer = _check(tokenizer, max_new_tokens, temperature, top_p)
    if not tokenizer.chat_template:
        raise UnsupportedError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, so it is a base model; "
            "continue a prompt with generate instead, or add chat_template.jinja"
        )
    inputs: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return _run(model, tokenizer, inputs, max_new_tokens, temperature, top_p, seed)


def _check(
    tokenizer: PreTrainedTokenizerBase | None, max_new_tokens: int, temperature: float, top_p: float
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UnsupportedError(
            "the checkpoint has no tokenizer; copy the original model's tokenizer files to its folder"
        )
    if max_new_tokens < 1:
        raise UnsupportedError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UnsupportedError(
            f"temperature = {temperature}, top_p = {top_p}: temperature must be 0 or more, top_p above 0 and at most 1"
        )
    return tokenizer


def _run(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[str]:
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    # what the thread hands over: a piece of text, the error that ended it, or None at the end
    pieces: Queue[str | BaseException | None] = Queue()
    stopped = Event()

    class Pieces(BaseStreamer):
        """Decodes all tokens so far and hands over what is new, but no unfinished UTF-8 character."""

        def __init__(self) -> None:
            self.tokens: list[int] | None = None  # the prompt comes first, and is not repeated
            self.said = 0

        def put(self, value: torch.Tensor) -> None:
            if self.tokens is None:
                self.tokens = []
                return
            self.tokens += value.flatten().tolist()
            text = self.decode(self.tokens)
            if not text.endswith(UNFINISHED):
                self.say(text)

        def end(self) -> None:
            self.say(self.decode(self.tokens or []))
            pieces.put(None)

        def decode(self, tokens: list[int]) -> str:
            return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        def say(self, text: str) -> None:
            if len(text) > self.said:
                pieces.put(text[self.said :])
                self.said = len(text)

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], stopped.is_set(), device=input_ids.device)

    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}

    def work() -> None:
        try:
            if seed is not None:
                torch.manual_seed(seed)
            model.generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                max_new_tokens=max_new_tokens,
                streamer=Pieces(),
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                **options,
            )
        except BaseException as error:  # raised again in the caller's thread
            pieces.put(error)

    def read() -> Iterator[str]:
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stopped.set()
            thread.join()

    return read()
