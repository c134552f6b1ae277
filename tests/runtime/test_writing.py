"""A model writes its own calibration text: the same again, enough of it, with ends and without, or it says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kappaquant.errors import PlanError, UnsupportedError
from kappaquant.quantizing.calibration.written import Rules
from kappaquant.runtime import writing
from kappaquant.runtime.writing import write
from reference.evaluate import MODEL

SHORT = Rules(rows=4, length=12)


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    model = tiny_models.tiny_model("llama")
    model.generation_config.eos_token_id = None
    return model, tiny_models.character_tokenizer()


def count(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


@pytest.mark.slow
def test_the_same_texts_again_and_enough_of_them(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    told: list[tuple[str, int, int]] = []
    texts = write(model, tokenizer, 500, SHORT, lambda *args: told.append(args))
    assert write(model, tokenizer, 500, SHORT) == texts
    assert count(tokenizer, texts) >= 500
    assert len(set(texts)) == len(texts)
    assert told[0] == ("write", 0, 500)
    assert told[-1] == ("write", 500, 500)
    assert write(model, tokenizer, 500, Rules(seed=1, rows=4, length=12)) != texts
    # a longer text begins with the shorter one
    assert write(model, tokenizer, 900, SHORT)[: len(texts)] == texts


def test_texts_begin_with_seeds_and_mix_their_kinds(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    texts = write(model, tokenizer, 3000, SHORT)
    found = [next(s for s in writing.seeds() if text.startswith(begin(s))) for text in texts]
    assert len({seed["kind"] for seed in found}) > 3
    # what this tokenizer has no tokens for is left out
    assert not {"zh", "ru", "ar"} & {seed["kind"] for seed in found}


def begin(seed: Any) -> str:
    """Without a chat template the question of a dialogue is plain text."""
    return str(seed["text"] if "text" in seed else seed["messages"][-1]["content"])


def test_dialogue_goes_through_the_chat_template() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    texts = write(model, tokenizer, 500, Rules(rows=24, length=8))
    assert any(text.startswith("Question: ") and "\nAnswer:" in text for text in texts)


def test_when_seeds_run_out_they_go_on_differently(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "seeds", lambda: [{"text": "One"}, {"text": "Two"}])
    texts = write(*tiny, 100, SHORT)
    assert len(texts) > 4
    assert len(set(texts)) == len(texts)
    assert {text[:3] for text in texts} == {"One", "Two"}


class Drawn:
    """In place of a sampler: each row's tokens, one after another."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.at = rows, 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        self.at += 1
        return torch.tensor([row[(self.at - 1) % len(row)] for row in self.rows])


@pytest.mark.parametrize("end", ["generation config", "tokenizer"])
def test_a_text_ends_with_its_end_token(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    model, tokenizer = tiny
    a, b, stop = tokenizer("ab!")["input_ids"]
    if end == "tokenizer":
        tokenizer.eos_token = "!"
    else:
        model.generation_config.eos_token_id = [stop]
    monkeypatch.setattr(writing, "seeds", lambda: [{"text": "One"}, {"text": "Two"}, {"text": "Six"}])
    rows = [[a, stop, b, b], [stop, a, a, a], [a, b, a, b]]
    monkeypatch.setattr(writing, "Sampler", lambda *args: Drawn(rows))
    texts = write(model, tokenizer, 12, Rules(rows=3, length=4))
    ends = sorted(text[3:] for text in texts)
    assert ends[0] == "a!"
    assert "abab" in ends
    assert "!" not in ends, "the row that ended at once gives no text"


def test_a_model_that_ends_every_text_at_once(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    model.generation_config.eos_token_id = 5
    monkeypatch.setattr(writing, "Sampler", lambda *args: lambda logits: torch.full((len(logits),), 5))
    with pytest.raises(UnsupportedError, match=r"ends each of \d+ texts at once"):
        write(model, tokenizer, 100, SHORT)


def test_what_it_is_not_asked_to_do(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="must be 2 or more"):
        write(*tiny, 1)
    monkeypatch.setattr(writing, "seeds", lambda: [{"text": "Мара"}])
    with pytest.raises(UnsupportedError, match="has no tokens for any seed"):
        write(*tiny, 100)


def test_a_token_at_the_beginning_is_not_written_twice(tmp_path: Path) -> None:
    """A tokenizer that puts its own first token before every text puts it there when the file is read."""
    from tokenizers import processors

    tokenizer: Any = tiny_models.character_tokenizer()
    tokenizer.bos_token = "~"
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing("~ $A", special_tokens=[("~", tokenizer.bos_token_id)])
    tokenizer.chat_template = "~{{ messages[-1]['content'] }}:"
    model = tiny_models.tiny_model("llama")
    texts = write(model, tokenizer, 400, SHORT)
    assert not any(text.startswith("~") for text in texts)
    assert all(tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) >= 1 for text in texts)
