"""A static cache and one step on fixed tensors say what the model says of the whole text, with and without a graph."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor

from benchmarks.random_model import packed
from kappaquant.errors import UnsupportedError
from kappaquant.runtime import decoding
from kappaquant.runtime.decoding import Decoder, decoder_of
from kappaquant.runtime.generate import tokens
from kappaquant.runtime.own_generate import OwnGenerate
from kappaquant.runtime.sampling import Sampler, Sampling

PROMPT, STEPS, PADDING = 13, 20, (0, 3, 7)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def prompts(rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [rows, PROMPT], padded on the left."""
    ids = torch.randint(3, 90, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in zip(mask, PADDING, strict=False):
        row[:padding] = 0
    return ids.to(device), mask.to(device)


def answers(rows: int, steps: int = STEPS, device: str = "cpu") -> Tensor:
    return torch.randint(3, 90, (steps, rows), generator=torch.Generator().manual_seed(2)).to(device)


@torch.no_grad()
def reference(model: Any, ids: Tensor, mask: Tensor, following: Tensor) -> Tensor:
    """Logits of each step, [rows, steps + 1, V], each row by itself and without a cache."""
    found = []
    for row, visible, next_ones in zip(ids, mask.bool(), following.T, strict=True):
        text = torch.cat([row[visible], next_ones])[None]
        found.append(model(text, use_cache=False).logits[0, -len(next_ones) - 1 :])
    return torch.stack(found)


def decoded(decoder: Decoder | OwnGenerate, ids: Tensor, mask: Tensor | None, following: Tensor) -> Tensor:
    """The same from a decoder."""
    found = [decoder.prefill(ids, mask).clone()]
    return torch.stack([*found, *(decoder.step(row).clone() for row in following)], 1)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_say_what_the_whole_text_says(architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with padding, a prompt in chunks, windows passed, and a prompt before it that leaves no trace."""
    monkeypatch.setattr(decoding, "FEWEST", 16)
    model = tiny_model(architecture)
    ids, mask = prompts(3)
    expected = reference(model, ids, mask, answers(3))
    model.set_attn_implementation(attention)
    decoder = Decoder(model, 3, PROMPT + STEPS)
    for chunk in (4096, 15, 3):  # tokens in three rows
        monkeypatch.setattr(decoding, "CHUNK", chunk)
        decoder.prefill(ids.flip(1))
        decoder.step(ids[:, 0])
        torch.testing.assert_close(decoded(decoder, ids, mask, answers(3)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 2, PROMPT])
def test_prompts_without_padding(architecture: str, length: int) -> None:
    model = tiny_model(architecture)
    ids, mask = prompts(1)
    ids, mask = ids[:, :length], mask[:, :length]
    expected = reference(model, ids, mask, answers(1))
    found = decoded(Decoder(model, 1, 64), ids, None, answers(1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_5"])
def test_transformers_generate_where_ours_does_not_fit(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(architecture)
    ids, mask = prompts(3)
    expected = reference(model, ids, mask, answers(3))
    text_config = model.config.get_text_config()
    text_config._attn_implementation_internal = "flex_attention"
    with caplog.at_level(logging.WARNING, "kappaquant"):
        decoder = decoder_of(model, 3, 64, graph=True)
    assert len(caplog.records) == 1
    assert "'flex_attention'" in caplog.text
    assert "generate runs it" in caplog.text
    text_config._attn_implementation_internal = "sdpa"
    torch.testing.assert_close(decoded(decoder, ids, mask, answers(3)), expected, atol=1e-4, rtol=1e-4)
    assert not decoder.graphed
    assert decoder.kernels_per_step is None


@pytest.mark.parametrize(("kind", "decoder"), [("Bloom", OwnGenerate), ("GPT2", Decoder)])
def test_models_of_other_kinds(kind: str, decoder: type) -> None:
    """Bloom has no position_ids and makes its own masks, of growing width."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, n_embd=64)
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config).eval()
    ids, mask = prompts(3)
    expected = reference(model, ids, mask, answers(3))
    made = decoder_of(model, 3, 64)
    assert type(made) is decoder
    torch.testing.assert_close(decoded(made, ids, mask, answers(3)), expected, atol=1e-4, rtol=1e-4)


def test_a_graph_on_the_cpu_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kappaquant"):
        decoder = Decoder(tiny_model("llama"), 1, 16, graph=True)
    assert "without a CUDA graph: the model is on cpu" in caplog.text
    decoder.prefill(torch.ones(1, 3).long())
    assert not decoder.graphed


def test_nothing_grows_or_moves() -> None:
    decoder = Decoder(tiny_model("qwen3_5_moe_text"), 2, 128)
    ids, mask = prompts(2)

    def held() -> tuple[int, list[int]]:
        gc.collect()
        states = [t for layer in decoder.cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        states += [t for layer in decoder.cache.layers for t in getattr(layer, "conv_states", {}).values()]
        states += [t for layer in decoder.cache.layers for t in getattr(layer, "recurrent_states", {}).values()]
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects()), [t.data_ptr() for t in states]

    decoder.prefill(ids, mask)
    for row in answers(2, 3):
        decoder.step(row)
    before = held()
    for _ in range(3):
        decoder.prefill(ids, mask)
        for row in answers(2, 30):
            decoder.step(row)
    assert held() == before


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.ones(1, 4), None, r"\[1, 4\].*\[2, T\]"),
        (torch.ones(2, 0), None, "from 1"),
        (torch.ones(2, 16), None, "to 15"),
        (torch.ones(2, 3), torch.ones(2, 4), "attention_mask of shape"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]]), "left"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]]), "left"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "left"),
    ],
)
def test_prompts_that_do_not_fit(ids: Tensor, mask: Tensor | None, message: str) -> None:
    decoder = Decoder(tiny_model("llama"), 2, 16)
    with pytest.raises(UnsupportedError, match=message):
        decoder.prefill(ids.long(), mask)


def test_steps_without_room() -> None:
    decoder = Decoder(tiny_model("llama"), 1, 16)
    with pytest.raises(UnsupportedError, match="prefill comes first"):
        decoder.step(torch.ones(1).long())
    decoder.prefill(torch.ones(1, 15).long())
    decoder.step(torch.ones(1).long())
    with pytest.raises(UnsupportedError, match="max_length is 16"):
        decoder.step(torch.ones(1).long())
    with pytest.raises(UnsupportedError, match="batch = 0"):
        Decoder(tiny_model("llama"), 0, 16)


def test_a_batch_ends_when_all_rows_have() -> None:
    model = tiny_model("llama")
    ids, mask = prompts(2)

    def run(ends: set[int]) -> list[list[int]]:
        decoder = Decoder(model, 2, 64)
        return list(tokens(decoder, ids, mask, Sampler(Sampling(), decoder.device), 20, ends))

    every = run(set())
    assert len(every) == 20
    first, second = zip(*every, strict=True)
    ends = {first[2], second[5]}
    last = max(next(i for i, token in enumerate(row) if token in ends) for row in (first, second))
    assert run(ends) == every[: last + 1]


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_graph_says_what_the_model_says(architecture: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than the window of gemma3, from graph to graph, and twice over the same ones."""
    monkeypatch.setattr(decoding, "FEWEST", 16)
    model = tiny_model(architecture).to("cuda", torch.bfloat16)
    ids, mask = prompts(rows, "cuda")
    following = answers(rows, 80, "cuda")
    graph, plain = Decoder(model, rows, 128), Decoder(model, rows, 128, graph=False)
    expected = decoded(plain, ids, mask, following)
    for _ in range(2):
        torch.testing.assert_close(decoded(graph, ids, mask, following), expected, atol=0, rtol=0)
    assert graph.graphed
    assert sorted(graph._graphs) == [16, 32, 64, 128]
    assert not plain.graphed
    assert graph.kernels_per_step is not None
    assert graph.kernels_per_step > 20


@gpu
@needs_gpu
@pytest.mark.parametrize("policy", [{"policy": "uniform", "bits": 3}, {"policy": "recipe", "recipe": "apex2"}])
@pytest.mark.parametrize("architecture", ["qwen3_5_moe_text", "qwen3_moe", "llama", "gemma3"])
def test_packed_models_are_captured(architecture: str, policy: dict[str, Any]) -> None:
    model = packed(tiny_model(architecture).config, "cuda", **policy)
    ids, mask = prompts(2, "cuda")
    following = answers(2, 40, "cuda")
    graph, plain = Decoder(model, 2, 128), Decoder(model, 2, 128, graph=False)
    expected, found = (decoded(decoder, ids, mask, following).float() for decoder in (plain, graph))
    assert graph.graphed
    assert (found - expected).norm() <= 5e-3 * expected.norm()  # sums in another order at most


@gpu
@needs_gpu
def test_a_thousand_steps_take_no_memory() -> None:
    model = tiny_model("qwen3_5").to("cuda", torch.bfloat16)
    decoder = Decoder(model, 1, 1100)
    ids, _ = prompts(1, "cuda")
    token = ids[:, 0]

    def held(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            decoder.step(token)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    decoder.prefill(ids)
    first, _ = held(1000)  # captures its graphs
    decoder.prefill(ids)  # which may reserve a segment more or less; steps may not
    second, reserved = held(0)
    assert held(1000) == (second, reserved)
    decoder.prefill(ids)
    assert held(0)[0] == second <= first  # the first time a few bytes more, which setting up held


@gpu
@needs_gpu
def test_what_can_not_be_captured_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    forward = model.forward

    def waiting(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits.sum().item()
        return out

    ids, mask = prompts(3, "cuda")
    expected = decoded(Decoder(model, 3, 64, graph=False), ids, mask, answers(3, device="cuda"))
    model.forward = waiting
    decoder = Decoder(model, 3, 64)
    with caplog.at_level(logging.WARNING, "kappaquant"):
        for _ in range(2):
            found = decoded(decoder, ids, mask, answers(3, device="cuda"))
            torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert len(caplog.records) == 1
    assert "synchronizing" in caplog.text
    assert "out.logits.sum().item()" in caplog.text


@gpu
@needs_gpu
def test_a_model_that_moved_is_captured_anew() -> None:
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    ids, mask = prompts(1, "cuda")
    following = answers(1, device="cuda")
    decoder = Decoder(model, 1, 64)
    expected = decoded(decoder, ids, mask, following)
    old = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for data in old:
        data.fill_(float("nan"))
    torch.testing.assert_close(decoded(decoder, ids, mask, following), expected, atol=0, rtol=0)
