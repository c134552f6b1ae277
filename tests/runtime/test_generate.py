"""Streaming text, with a tiny model and a tokenizer of one character a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import character_tokenizer, tiny_model
from transformers import PreTrainedTokenizerFast

from kappaquant.errors import UnsupportedError
from kappaquant.runtime import decoding
from kappaquant.runtime.decoding import Decoder
from kappaquant.runtime.generate import Text, chat, stream

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = tiny_model("llama")
    loaded.generation_config.eos_token_id = None
    return loaded


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


def _expected(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_pieces_add_up_to_what_generate_says(model: Any, tokenizer: Any) -> None:
    pieces = list(stream(model, tokenizer, "two and two", max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == _expected(model, tokenizer, "two and two", 12)


def test_sampling_with_a_seed_is_repeatable(model: Any, tokenizer: Any) -> None:
    first, again, other = (
        "".join(stream(model, tokenizer, "two", max_new_tokens=24, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_an_error_in_the_model_reaches_the_caller(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(model, tokenizer, "two"))


def test_closing_the_stream_stops_the_model(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    pieces = stream(model, tokenizer, "two", max_new_tokens=100)
    next(pieces)
    taken = len(steps)
    pieces.close()
    assert len(steps) == taken < 5
    with pytest.raises(StopIteration):
        next(pieces)


def test_chat_applies_the_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    assert "".join(chat(model, tokenizer, messages, max_new_tokens=9)) == _expected(model, tokenizer, "user:hi a:", 9)


def test_chat_without_a_template_says_what_to_do(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        chat(model, tokenizer, [{"role": "user", "content": "hi"}])


def test_an_end_token_ends_the_text(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _expected(model, tokenizer, "two", 12)
    ids = tokenizer(text)["input_ids"]
    end = next(token for token in ids if token != ids[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    expected = tokenizer.decode(ids[: ids.index(end)])
    assert "".join(stream(model, tokenizer, "two", max_new_tokens=12)) == expected


def test_streams_side_by_side_do_not_disturb_each_other(model: Any, tokenizer: Any) -> None:
    prompts = ["two and two", "one"]
    streams = [stream(model, tokenizer, prompt, max_new_tokens=9) for prompt in prompts]
    texts = ["".join(pieces) for pieces in zip(*streams, strict=True)]
    assert texts == [
        "".join(pieces) for pieces in zip(*(_expected(model, tokenizer, p, 9) for p in prompts), strict=True)
    ]


def test_one_decoder_serves_prompt_after_prompt(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    decoding._KEPT.clear()
    for _ in range(3):
        list(stream(model, tokenizer, "two", max_new_tokens=3))
    assert len(made) == 1
    list(stream(model, tokenizer, "two", max_new_tokens=decoding.ROOM))
    assert len(made) == 2


class Words:
    """A tokenizer whose tokens are the given bytes, decoded together as UTF-8 is."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int], **options: Any) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def pushed(text: Text, count: int) -> list[str]:
    found = []
    for token in range(count):
        found.append(text.push(token))
        if text.stopped:
            return found
    return [*found, text.end()]


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"a", b"\xe2\x82", b"\xac", b"b"], [], ["a", "", "€", "b", ""]),
        ([b"a", b"\xe2\x82"], [], ["a", "", "\ufffd"]),  # cut off within a character
        ([b"ab", b"cd", b"ef"], ["cde"], ["ab", "", ""]),
        ([b"ab", b"cd", b"xy"], ["cde"], ["ab", "", "cdxy", ""]),  # withheld, but it was none
        ([b"ab", b"cd"], ["cde"], ["ab", "", "cd"]),  # withheld until the end
        ([b"abcdef"], ["ef", "cd"], ["ab"]),  # the first in the text, not in the list
        ([b"aa", b"ab"], ["aab"], ["", "a"]),
        ([b"one\n", b"\nQ:"], ["\n\n"], ["one", ""]),
    ],
)
def test_text_is_withheld_while_it_is_uncertain(pieces: list[bytes], stop: list[str], expected: list[str]) -> None:
    assert pushed(Text(Words(*pieces), stop), len(pieces)) == expected  # type: ignore[arg-type]


def test_stop_strings_end_the_stream(model: Any, tokenizer: Any) -> None:
    whole = _expected(model, tokenizer, "two", 12)
    stop = whole[5:7]
    got = "".join(stream(model, tokenizer, "two", max_new_tokens=12, stop=[stop]))
    assert got == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5},
        {"top_k": -1}, {"min_p": 1.5}, {"stop": ["a", ""]}, {"stop": "a"},
    ],
)  # fmt: skip
def test_options_out_of_range(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{next(iter(options))} ="):
        stream(model, tokenizer, "two", **options)


def test_no_tokenizer(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        stream(model, None, "two")


def test_gradients_stay_enabled_between_pieces(model: Any, tokenizer: Any) -> None:
    for _ in stream(model, tokenizer, "two", max_new_tokens=3):
        assert torch.is_grad_enabled()
