"""Text of every architecture of transformers is what its own ``generate`` says, whatever its cache is and is called."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import CAUSAL, small_model
from tiny_checkpoints import quantize
from tiny_models import character_tokenizer, tiny_model

import kappaquant
from kappaquant.errors import UnsupportedError
from kappaquant.runtime import decoding
from kappaquant.runtime.decoding import Decoder, decoder_of, why_not
from kappaquant.runtime.generate import stream, tokens
from kappaquant.runtime.own_generate import OwnGenerate
from kappaquant.runtime.sampling import Sampler, Sampling

# caches under another name, of another class, none, or of layers that ours does not know; the last two go by ours
FAST = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "xlstm",
    "minimax",
    "bloom",
    "nemotron_h",
    "llama4_text",
    "gpt2",
    "qwen3_next",
)
MAMBA = {"intermediate_size": 256, "time_step_rank": 8}
PROMPT = "two and two are four"


def plainly(model: Any, prompt: str = PROMPT, count: int = 24) -> str:
    tokenizer = character_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    out = model.generate(ids, attention_mask=inputs["attention_mask"], max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def streamed(model: Any, prompt: str = PROMPT, count: int = 24, **options: Any) -> str:
    return "".join(stream(model, character_tokenizer(), prompt, max_new_tokens=count, **options))


@pytest.mark.parametrize(
    "model_type", [*FAST, *(pytest.param(t, marks=pytest.mark.slow) for t in CAUSAL if t not in FAST)]
)
def test_text_is_what_generate_says(model_type: str) -> None:
    try:
        model = small_model(model_type)
        expected = plainly(model)
    except Exception as problem:
        if model_type in FAST:
            raise
        pytest.skip(f"transformers makes no small one, or no text of it: {problem}")
    assert streamed(model) == expected


@pytest.mark.parametrize("model_type", ["mamba", "minimax", "bloom"])
def test_rows_with_padding(model_type: str) -> None:
    """Batches are what a model writes its calibration text in."""
    model = small_model(model_type)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 9:].T.tolist()
    decoder = decoder_of(model, 2, 32)
    assert isinstance(decoder, OwnGenerate)
    sampler = Sampler(Sampling(), decoder.device)
    for _ in range(2):  # nothing is left of a text that was begun before
        next(tokens(decoder, ids.flip(1), None, sampler, 12))
        assert list(tokens(decoder, ids, mask, sampler, 12)) == expected


def test_a_packed_model_says_what_its_own_generate_says(tmp_path: Path) -> None:
    small_model("mamba", **MAMBA).save_pretrained(tmp_path / "source")
    character_tokenizer().save_pretrained(tmp_path / "source")
    model, _ = kappaquant.load(quantize(tmp_path / "source", tmp_path / "quantized"))
    model.generation_config.eos_token_id = None
    assert any(type(module).__name__ == "QuantLinear" for module in model.modules())
    assert streamed(model) == plainly(model)


def test_what_the_generation_config_adds_is_left_out() -> None:
    """As it is where our decoder runs."""
    model = small_model("mamba")
    expected = plainly(model)
    model.generation_config.update(repetition_penalty=5.0, suppress_tokens=[33], do_sample=True, eos_token_id=34)
    decoder = decoder_of(model, 1, 64)
    ids = character_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    found = [token for (token,) in tokens(decoder, ids, None, Sampler(Sampling(), decoder.device), 24)]
    assert character_tokenizer().decode(found, skip_special_tokens=True) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_draws_are_repeatable_and_an_end_ends_the_thread() -> None:
    model, before = small_model("mamba"), threading.active_count()
    first, again, other = (streamed(model, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    pieces = stream(model, character_tokenizer(), "two", max_new_tokens=100)
    next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()
    assert threading.active_count() == before
    decoder = decoder_of(model, 1, 16)
    decoder.prefill(torch.ones(1, 3).long())
    del decoder
    assert threading.active_count() == before


def test_an_error_in_the_model_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = small_model("mamba"), threading.active_count()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        streamed(model)
    assert threading.active_count() == before


def test_room_and_prompts_are_checked_as_ours_are() -> None:
    model = small_model("mamba")
    with pytest.raises(UnsupportedError, match="batch = 0"):
        decoder_of(model, 0, 16)
    decoder = decoder_of(model, 1, 4)
    with pytest.raises(UnsupportedError, match="prefill comes first"):
        decoder.step(torch.ones(1).long())
    with pytest.raises(UnsupportedError, match=r"must be \[1, T\], T from 1 to 3"):
        decoder.prefill(torch.ones(1, 4).long())
    decoder.prefill(torch.ones(1, 3).long())
    decoder.step(torch.ones(1).long())
    with pytest.raises(UnsupportedError, match="max_length is 4"):
        decoder.step(torch.ones(1).long())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "the model takes no position_ids"),
        ("bloom", "the model takes no position_ids"),
        ("minimax", "the model has a cache of its own"),
        ("doge", "the model is not known to work with a static cache"),
        ("nemotron_h", "layers of type"),
    ],
)
def test_our_decoder_refuses_what_it_does_not_know(model_type: str, reason: str) -> None:
    model = small_model(model_type)
    assert str(why_not(model)).startswith(reason)
    with pytest.raises(UnsupportedError, match=reason):
        Decoder(model, 1, 16)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="LlamaModel: has no head that predicts tokens"):
        streamed(tiny_model("llama").model)


def test_prompt_after_prompt_keeps_no_decoder_of_this_kind() -> None:
    model = small_model("mamba")
    decoding._KEPT.clear()
    streamed(model, count=3)
    assert model not in decoding._KEPT
