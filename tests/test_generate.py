"""Streaming text, with a tiny model and a tokenizer of one character a token."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kappaquant.errors import UnsupportedError
from kappaquant.generate import chat, stream

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
    characters = [chr(32 + i) for i in range(VOCABULARY - 1)]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, "<unk>"])}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


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
    threads = threading.active_count()
    pieces.close()
    assert len(steps) < 90
    assert threading.active_count() == threads - 1


def test_chat_applies_the_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    assert "".join(chat(model, tokenizer, messages, max_new_tokens=9)) == _expected(model, tokenizer, "user:hi a:", 9)


def test_chat_without_a_template_says_what_to_do(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        chat(model, tokenizer, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_out_of_range(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"{next(iter(options))} ="):
        stream(model, tokenizer, "two", **options)


def test_no_tokenizer(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        stream(model, None, "two")


def test_nothing_is_left_running(model: Any, tokenizer: Any) -> None:
    before = threading.active_count()
    list(stream(model, tokenizer, "two", max_new_tokens=3))
    assert threading.active_count() == before
    assert torch.is_grad_enabled()
