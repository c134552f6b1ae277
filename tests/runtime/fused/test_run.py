"""Layers that a step takes in one call: the very numbers of one call for each, and nobody left out who looks in between."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fused_models import FAMILIES, PROMPT, STEPS, layers, load, logits
from tiny_models import VOCABULARY, save_tiny

import kappaquant
from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cpu.library import absence
from kappaquant.kernels.cpu.step import Stack, Stepper
from kappaquant.runtime import decoding
from kappaquant.runtime.decoding import Decoder
from kappaquant.runtime.fused.run import runs_of, together

pytestmark = pytest.mark.skipif(bool(absence()), reason=absence())

ALIKE = [name for name in FAMILIES if name not in ("qwen2", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe")]
"""Families whose two layers are of one kind here."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of each call for several."""
    taken: list[int] = []
    own = Stepper.layers

    def counted(self: Stepper, x: torch.Tensor, stack: Stack, *rest: Any) -> torch.Tensor | None:
        taken.append(len(stack.layers))
        return own(self, x, stack, *rest)

    monkeypatch.setattr(Stepper, "layers", counted)
    return taken


def one_by_one(monkeypatch: pytest.MonkeyPatch, model: Any, **options: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "runs_of", lambda _: {})
        return logits(model, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ALIKE)
def test_the_numbers_are_those_of_single_layers(
    architecture: str,
    dtype: torch.dtype,
    checkpoints: dict[str, Path],
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(checkpoints[architecture], dtype, "int8")
    for batch in (1, 3):
        calls.clear()
        found = logits(model, batch, padded=batch > 1)
        assert calls == [2] * STEPS
        assert torch.equal(found, one_by_one(monkeypatch, model, batch=batch, padded=batch > 1))
        assert len(calls) == STEPS


def test_recurrent_layers_too(tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.AutoConfig.from_pretrained(save_tiny("qwen3_5_moe_text", tmp_path / "two"))
    config.num_hidden_layers, config.layer_types = 6, ["linear_attention"] * 6
    config.layer_types[3] = "full_attention"
    transformers.Qwen3_5MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "six")
    source = kappaquant.open_source(tmp_path / "six")
    plan = kappaquant.make_plan(source.tensors, source.config, policy="uniform", bits=4)
    model = load(kappaquant.quantize(source, tmp_path / "out", plan), torch.bfloat16, "int8")
    found = logits(model, 2)
    assert calls == [3, 2] * STEPS  # and the fourth of six layers alone
    assert torch.equal(found, one_by_one(monkeypatch, model, batch=2))


def test_layers_of_several_masks_are_not_together(checkpoints: dict[str, Path]) -> None:
    assert runs_of(load(checkpoints["qwen2"])) == {}


class TestWhoLooksInBetween:
    def test_hooks_see_every_layer(self, checkpoints: dict[str, Path], calls: list[int]) -> None:
        model = load(checkpoints["qwen3"])
        before = logits(model)
        seen: list[torch.Tensor] = []
        hook = layers(model)[0].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        calls.clear()
        assert torch.equal(logits(model), before)
        assert not calls
        assert len({float(states.sum()) for states in seen}) == len(seen) == 1 + STEPS
        hook.remove()
        doubled = layers(model)[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        assert not torch.equal(logits(model)[1:], before[1:])
        doubled.remove()
        logits(model)
        assert calls == [2] * STEPS

    def test_hooks_on_all_modules(self, checkpoints: dict[str, Path], calls: list[int]) -> None:
        model = load(checkpoints["qwen3"])
        with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
            logits(model)
        assert not calls

    def test_states_that_were_changed_are_an_error(self, checkpoints: dict[str, Path]) -> None:
        model = load(checkpoints["qwen3"])
        decoder = Decoder(model, 1, 64)
        decoder.prefill(torch.tensor([[5, 6, 7]]))
        second = layers(model)[1]
        own = type(second).__call__

        class Changed(type(second)):  # type: ignore[misc]
            def __call__(self, x: torch.Tensor, **kwargs: Any) -> Any:
                return own(self, x + 1, **kwargs)

        second.__class__ = Changed
        with pytest.raises(UnsupportedError, match="changed between two layers"):
            decoder.step(torch.tensor([8]))

    def test_a_forward_of_its_own_is_called(self, checkpoints: dict[str, Path], calls: list[int]) -> None:
        model = load(checkpoints["qwen3"])
        decoder = Decoder(model, 1, 64)
        decoder.prefill(torch.tensor([[5, 6, 7]]))
        second, taken = layers(model)[1], []
        native = second.forward
        second.forward = lambda *args, **kwargs: taken.append(1) or native(*args, **kwargs)
        decoder.step(torch.tensor([8]))
        assert (taken, calls) == ([1], [])

    def test_fewer_layers_than_there_are(self, checkpoints: dict[str, Path], calls: list[int]) -> None:
        model = load(checkpoints["qwen3"])
        expected = logits(model)
        model.config.num_hidden_layers = 1
        calls.clear()
        assert not torch.equal(logits(model), expected)
        assert not calls


def test_a_cache_without_room_is_left_as_it_is(checkpoints: dict[str, Path], calls: list[int]) -> None:
    model = load(checkpoints["qwen3"])
    decoder = Decoder(model, 1, 16)
    decoder.prefill(torch.randint(3, VOCABULARY, (1, PROMPT)))
    second = decoder.cache.layers[1]
    second.cumulative_length.fill_(16)
    before = [part.keys.clone() for part in decoder.cache.layers]
    with pytest.raises((RuntimeError, IndexError)):  # that of the modules, which see for themselves
        decoder.step(torch.tensor([8]))
    assert calls == [2]
    assert torch.equal(second.keys, before[1])


def test_two_decoders_of_one_model_in_two_threads(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["qwen3"])
    expected = {batch: logits(model, batch) for batch in (1, 3)}
    found: dict[int, list[torch.Tensor]] = {1: [], 3: []}

    def write(batch: int) -> None:
        found[batch] = [logits(model, batch) for _ in range(5)]

    threads = [threading.Thread(target=write, args=[batch]) for batch in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        len(each) == 5 and all(torch.equal(one, expected[batch]) for one in each) for batch, each in found.items()
    )


def test_outside_of_steps_layers_are_for_themselves(checkpoints: dict[str, Path], calls: list[int]) -> None:
    model = load(checkpoints["qwen3"])
    prompt = torch.randint(3, VOCABULARY, (1, 9))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with together(runs_of(model), 2):
        pass
    model.generate(prompt, **options)
    assert not calls
