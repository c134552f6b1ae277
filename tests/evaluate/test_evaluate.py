"""Divergence, perplexity and exact match against their definitions, computed one sequence at a time in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, character_tokenizer, save_tiny, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kappaquant
from kappaquant import evaluate
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.batches import by_length, pad
from kappaquant.evaluate.measures.intervals import clustered_mean

MODELS = ("llama", "qwen3_5_moe_text")  # plain attention; recurrent state and experts


def sequences(count: int = 7, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 24))] for _ in range(count)]


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def noisy(architecture: str) -> Any:
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("architecture", MODELS)
def test_divergence_and_perplexity_by_definition(architecture: str) -> None:
    original, variant, given = tiny_model(architecture), noisy(architecture), sequences()
    klds: list[list[float]] = []
    losses: list[float] = []
    agreed = 0
    for ids in given:
        p, q = log_probabilities(original, ids), log_probabilities(variant, ids)
        klds.append((p.exp() * (p - q)).sum(-1).tolist())
        losses += [-q[i, token].item() for i, token in enumerate(ids[1:])]
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    every = [kld for of_one in klds for kld in of_one]
    found = evaluate.kl_divergence(variant, original, given)
    assert found.mean == pytest.approx(statistics.fmean(every), rel=1e-3)
    assert found.median == pytest.approx(statistics.median(every), rel=1e-3)
    assert found.maximum == pytest.approx(max(every), rel=1e-3)
    assert found.median < found.p99 <= found.maximum
    assert found.same_top == pytest.approx(agreed / len(every))
    assert found.perplexity.value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)
    assert found.perplexity.tokens == sum(len(ids) - 1 for ids in given) == len(every)
    assert found.perplexity.sequences == len(given)
    residual = sum((sum(k) - statistics.fmean(every) * len(k)) ** 2 for k in klds) * 7 / 6
    assert found.mean_error == pytest.approx(math.sqrt(residual) / len(every), rel=1e-2)
    alone = evaluate.perplexity(variant, given)
    assert alone.value == pytest.approx(found.perplexity.value, rel=1e-6)
    assert alone.nll_error == pytest.approx(found.perplexity.nll_error, rel=1e-4)


def test_a_model_does_not_differ_from_itself() -> None:
    model = tiny_model("llama")
    found = evaluate.kl_divergence(model, model, sequences())
    assert found.mean == found.maximum == 0
    assert found.same_top == 1
    assert found.perplexity == found.original_perplexity


@pytest.mark.parametrize("architecture", MODELS)
def test_memory_bounds_change_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, variant, given = tiny_model(architecture), noisy(architecture), sequences(5)
    whole = evaluate.kl_divergence(variant, original, given)
    seen: list[int] = []
    inner = original.forward
    monkeypatch.setattr(
        original, "forward", lambda **inputs: (seen.append(inputs["input_ids"].numel()), inner(**inputs))[1]
    )
    monkeypatch.setattr("kappaquant.evaluate.measures.divergence._CHUNK", 3 * VOCABULARY)
    small = evaluate.kl_divergence(variant, original, given, max_logits_bytes=30 * VOCABULARY * 4)
    assert len(seen) > 2
    assert max(seen) <= 30
    flat, same = (json.loads(json.dumps(dataclasses.asdict(d))) for d in (whole, small))
    for key in ("mean", "mean_error", "median", "p99", "maximum", "same_top"):
        assert same[key] == pytest.approx(flat[key], rel=1e-3), key


def test_fewer_bits_lie_further_from_the_original(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "source")
    source, original, given = kappaquant.open_source(folder), tiny_model("qwen3_moe"), sequences()
    means = []
    for bits in (3, 5, 8):
        plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=bits)
        variant, _ = kappaquant.load(kappaquant.quantize(source, tmp_path / str(bits), plan))
        means.append(evaluate.kl_divergence(variant, original, given).mean)
    assert means[0] > 5 * means[1] > 25 * means[2] > 0


def test_divergence_refuses_what_cannot_be_compared() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(UnsupportedError, match=f"{VOCABULARY + 8} entries, the original's {VOCABULARY}"):
        evaluate.kl_divergence(other, model, sequences())
    for given in ([], [[5, 6], [7]]):
        with pytest.raises(UnsupportedError, match="at least 2 tokens"):
            evaluate.perplexity(model, given)


def test_clustered_errors() -> None:
    mean, error = clustered_mean([2.0, 4.0, 9.0, 1.0], [2, 2, 2, 2])
    means = [1.0, 2.0, 4.5, 0.5]
    assert mean == statistics.fmean(means)
    assert error == pytest.approx(statistics.stdev(means) / 2)
    assert clustered_mean([3.0], [2]) == (1.5, None)
    assert clustered_mean([10.0, 20.0], [10, 20]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("hits", "n", "interval"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (193, 200, (0.9295, 0.9829))],
)
def test_wilson(hits: int, n: int, interval: tuple[float, float]) -> None:
    assert evaluate.wilson(hits, n) == pytest.approx(interval, abs=5e-5)


def test_wilson_edges() -> None:
    assert evaluate.wilson(0, 0) == (0.0, 1.0)
    narrow, wide = evaluate.wilson(50, 100, 0.5), evaluate.wilson(50, 100, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    with pytest.raises(ValueError, match="3 hits in 2 trials"):
        evaluate.wilson(3, 2)


def test_sign_test_by_enumeration() -> None:
    assert evaluate.sign_test(1, 9) == evaluate.sign_test(9, 1) == pytest.approx(22 / 1024)
    assert evaluate.sign_test(0, 4) == 0.125
    assert evaluate.sign_test(0, 0) == evaluate.sign_test(3, 3) == 1


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters without a padding token."""
    vocabulary = {"<end>": 2, **{chr(33 + i): i for i in range(3, VOCABULARY)}, "<0>": 0, "<1>": 1}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<1>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.mark.parametrize("architecture", MODELS)
def test_completions_in_a_batch_are_those_of_each_prompt_alone(architecture: str, letters: Any) -> None:
    model, prompts = tiny_model(architecture), ["hello", "a", "what-is-this?", "abc", "zz"]
    together = evaluate.complete(model, letters, prompts, max_new_tokens=6, batch_size=3)
    alone = []
    for prompt in prompts:
        ids = letters(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=2)
        alone.append(letters.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert together == alone
    assert len(set(together)) == len(prompts)


def test_exact_match_counts_what_the_extractor_finds(letters: Any) -> None:
    model, prompts = tiny_model("llama"), ["hello", "a", "abc"]
    said = evaluate.complete(model, letters, prompts, max_new_tokens=4)
    questions = [evaluate.Question(p, len(t)) for p, t in zip(prompts, said, strict=True)]
    questions[1] = evaluate.Question("a", -1)
    found = evaluate.exact_match(model, letters, questions, len, max_new_tokens=4)
    assert found.completions == tuple(said)
    assert found.correct == (True, False, True)
    assert (found.hits, found.n, found.share) == (2, 3, 2 / 3)
    assert found.interval() == evaluate.wilson(2, 3)
    none = evaluate.exact_match(model, letters, questions, lambda text: None, max_new_tokens=1)
    assert none.hits == 0


def test_exact_match_refuses_nothing_to_ask(letters: Any) -> None:
    with pytest.raises(UnsupportedError, match="at least one question"):
        evaluate.exact_match(tiny_model("llama"), letters, [], len)
    with pytest.raises(UnsupportedError, match="prompt 1 has no tokens"):
        evaluate.complete(tiny_model("llama"), letters, ["a", ""])


def match(*correct: bool) -> evaluate.ExactMatch:
    return evaluate.ExactMatch(("",) * len(correct), correct)


def test_paired_comparison() -> None:
    first, second = match(True, True, True, False, True), match(True, False, False, True, False)
    assert evaluate.paired(first, second) == evaluate.Paired(1, 3, 1, 0, evaluate.sign_test(3, 1))
    with pytest.raises(UnsupportedError, match="5 against 1"):
        evaluate.paired(first, match(True))


@pytest.mark.parametrize(
    ("has", "adds", "bos", "begin"),
    [
        ("~", True, "auto", "~"),
        ("~", True, "always", "~"),
        ("~", True, "never", ""),
        ("~", False, "auto", ""),
        ("~", False, "always", "~"),
        (None, False, "auto", ""),
    ],
)
def test_every_window_begins_as_it_is_said(has: str | None, adds: bool, bos: Any, begin: str) -> None:
    """Not the first alone, which is what a tokenizer does for a whole text."""
    tokenizer = character_tokenizer(has, adds)
    found = evaluate.windows(tokenizer, ["abcdefg", "hi"], 3, bos)
    inside = 3 - len(begin)
    assert ["".join(tokenizer.convert_ids_to_tokens(w)) for w in found] == [
        begin + text[start : start + inside]
        for text in ("abcdefg", "hi")
        for start in range(0, len(text), inside)
        if len(begin) + len(text[start : start + inside]) > 1
    ]


def test_what_windows_cannot_begin_with() -> None:
    with pytest.raises(UnsupportedError, match="has no BOS token; take auto or never"):
        evaluate.windows(character_tokenizer(), ["abc"], 3, "always")
    with pytest.raises(UnsupportedError, match="must be one of auto, always, never"):
        evaluate.windows(character_tokenizer(), ["abc"], 3, "first")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="at least 2 tokens"):
        evaluate.windows(character_tokenizer("~", True), ["abc"], 1)


def test_windows(letters: Any) -> None:
    assert [len(w) for w in evaluate.windows(letters, ["abcdefg", "a", "", "abc"], 3)] == [3, 3, 3]
    assert evaluate.windows(letters, ["abcde"], 3)[1] == letters("de")["input_ids"]
    with pytest.raises(UnsupportedError, match="max_tokens = 1"):
        evaluate.windows(letters, ["abc"], 1)


def test_batches() -> None:
    given = sequences(20, seed=3)
    batches = list(by_length(given, 30))
    assert sorted(i for batch in batches for i in batch) == list(range(20))
    assert all(len(batch) == 1 or len(batch) * max(len(given[i]) for i in batch) <= 30 for batch in batches)
    assert list(by_length([[1, 2, 3]], 1)) == [[0]]
    ids, mask = pad([[5, 6, 7], [8]], "left", 9)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]])
    ids, mask = pad([[5, 6, 7], [8]], "right", 9)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]])


def test_report_is_json() -> None:
    model, variant, given = tiny_model("llama"), noisy("llama"), sequences()
    found = evaluate.kl_divergence(variant, model, given)
    variants = [
        evaluate.Variant("bf16", 100, 16.0, found.original_perplexity, match(True, True)),
        evaluate.Variant("small", 25, 4.125, found.perplexity, match(True, False), found),
    ]
    data = json.loads(json.dumps(evaluate.json_report(variants, {"what": "a test"})))
    assert data["what"] == "a test"
    first, second = data["variants"]
    assert "kld_nats" not in first
    assert second["kld_nats"]["mean"] == pytest.approx(found.mean, rel=1e-5)
    assert second["exact_match"] == {"correct": 1, "of": 2, "share": 0.5, "wilson_95": [0.0945312, 0.905469]}
    assert second["perplexity"]["tokens"] == found.perplexity.tokens
    (pair,) = data["paired_exact_match"]
    assert (pair["first"], pair["second"], pair["only_first"], pair["p_value"]) == ("bf16", "small", 1, 1.0)
