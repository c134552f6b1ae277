"""Layers by the native core against the modules they stand in for, from one and the same cache."""

from __future__ import annotations

import contextlib
import copy
import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TEXT, VOCABULARY, save_tiny

import kappaquant
from kappaquant.kernels.cpu.library import absence
from kappaquant.kernels.cpu.step import Stepper
from kappaquant.runtime.assemble import set_activations
from kappaquant.runtime.decoding import Decoder
from kappaquant.runtime.fused import native
from kappaquant.runtime.fused.layers import fuse

pytestmark = pytest.mark.skipif(bool(absence()), reason=absence())

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe")
PROMPT, STEPS = 6, 20


def save(architecture: str, folder: Path) -> Path:
    if architecture != "qwen2":
        return save_tiny(architecture, folder, dtype=torch.bfloat16)
    torch.manual_seed(0)  # biases, and a window that ends within the text
    config = transformers.Qwen2Config(
        **TEXT | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    )
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed checkpoints of all families: some tensors in 16 bits, experts at 3, others at 4, of which some in trellis codes."""
    made = {}
    for architecture in FAMILIES:
        folder = tmp_path_factory.mktemp(architecture)
        source = kappaquant.open_source(save(architecture, folder / "source"))
        wanted: tuple[tuple[str, int | str], ...] = (
            ("*.experts.*", 3),
            ("*.0.mlp.down_proj.weight", "t4g64"),
            ("*.k_proj.weight", "t3g128"),
            ("*.v_proj.weight", 16),
            ("*.in_proj_a.weight", 16),
            ("*.1.mlp.up_proj.weight", 16),
        )
        overrides = [(glob, bits) for glob, bits in wanted if any(fnmatchcase(name, glob) for name in source.tensors)]
        plan = kappaquant.make_plan(source.tensors, source.config, policy="uniform", bits=4, overrides=overrides)
        kappaquant.quantize(source, folder / "out", plan)
        made[architecture] = folder / "out"
    return made


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every layer's step of the native core."""
    taken: list[int] = []
    own = Stepper.mlp_

    def counted(self: Stepper, x: torch.Tensor, layer: Any) -> torch.Tensor:
        taken.append(len(x))
        return own(self, x, layer)

    monkeypatch.setattr(Stepper, "mlp_", counted)
    return taken


def load(folder: Path, dtype: torch.dtype = torch.float32, activations: str = "float32") -> Any:
    return kappaquant.load(folder, dtype=dtype, activations=activations)[0]


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), native.NativeLayer)]


def unfused(model: Any) -> Any:
    for layer in layers(model):
        del layer.forward
    return model


def logits(model: Any, batch: int = 1, padded: bool = False) -> torch.Tensor:
    """[1 + STEPS, batch, vocabulary], of a prompt and of tokens after it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (batch, PROMPT + STEPS), generator=generator)
    mask = torch.ones(batch, PROMPT, dtype=torch.int64)
    if padded:
        mask[-1, :2] = 0
    decoder = Decoder(model, batch, 64)
    found = [decoder.prefill(tokens[:, :PROMPT], mask)]
    found += [decoder.step(tokens[:, i]) for i in range(PROMPT, PROMPT + STEPS)]
    return torch.stack(found).float()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_steps_are_those_of_the_modules(
    architecture: str, batch: int, checkpoints: dict[str, Path], steps: list[int]
) -> None:
    model = load(checkpoints[architecture])
    assert len(layers(model)) == 2
    found = logits(model, batch, padded=batch > 1)
    assert steps == [batch] * 2 * STEPS
    assert error(found, logits(unfused(model), batch, padded=batch > 1)) < 2e-5
    assert len(steps) == 2 * STEPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_5"])
def test_states_in_16_bits_are_kept_as_the_cache_keeps_them(
    architecture: str, dtype: torch.dtype, checkpoints: dict[str, Path], steps: list[int]
) -> None:
    model = load(checkpoints[architecture], dtype)
    found = logits(model)
    assert steps
    exact = logits(load(checkpoints[architecture]))
    modules = error(logits(unfused(model)), exact)
    assert error(found, exact) < modules  # which round to 16 bits after every operation


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_5"])
def test_int8_inputs_are_those_of_the_modules(architecture: str, checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints[architecture], activations="int8")
    found = logits(model)
    assert error(found, logits(unfused(model))) < 5e-3  # an input that lies between two steps may go either way
    assert 1e-4 < error(found, logits(load(checkpoints[architecture]))) < 0.2


def test_inputs_may_change_their_kind_after_loading(checkpoints: dict[str, Path], steps: list[int]) -> None:
    model = load(checkpoints["qwen3"], activations="int8")
    logits(model)
    set_activations(model, "float32")
    assert error(logits(model), logits(load(checkpoints["qwen3"]))) < 1e-6
    assert len(steps) == 3 * 2 * STEPS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3_5_moe_text"])
def test_transformers_generate_takes_it_with_its_own_cache(
    architecture: str, attention: str, checkpoints: dict[str, Path], steps: list[int]
) -> None:
    model = load(checkpoints[architecture])
    model.set_attn_implementation(attention)
    prompt = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(prompt, **options)
    assert len(steps) == 2 * 11
    expected = unfused(model).generate(prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert error(torch.stack(found.logits), torch.stack(expected.logits)) < 2e-5


def test_long_texts_in_parts_of_the_cache(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["qwen3"])
    tokens = torch.randint(3, VOCABULARY, (1, 600), generator=torch.Generator().manual_seed(3))
    runs = []
    for one in (model, unfused(load(checkpoints["qwen3"]))):
        decoder = Decoder(one, 1, 640)
        decoder.prefill(tokens)
        runs.append(torch.stack([decoder.step(tokens[:, i]) for i in range(4)]))
    assert error(*runs) < 2e-5


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int, checkpoints: dict[str, Path]) -> None:
    before, model = torch.get_num_threads(), load(checkpoints["qwen3_5_moe_text"])
    expected = logits(model)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(logits(model)[1:], logits(model)[1:])
        assert error(logits(model), expected) < 1e-5
    finally:
        torch.set_num_threads(before)


class TestWhatTheModulesOwnCodeIsFor:
    def test_hooks_run(self, checkpoints: dict[str, Path], steps: list[int]) -> None:
        model = load(checkpoints["qwen3"])
        seen: list[int] = []
        first, _ = layers(model)
        hook = first.self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
        logits(model)
        assert (len(seen), len(steps)) == (1 + STEPS, STEPS)
        hook.remove()
        logits(model)
        assert len(steps) == STEPS + 2 * STEPS

    def test_modules_in_place_of_others_are_called(self, checkpoints: dict[str, Path], steps: list[int]) -> None:
        class Doubled(torch.nn.Module):
            def __init__(self, inner: torch.nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * self.inner(x)

        model = load(checkpoints["llama"])
        before = logits(model)
        for layer in layers(model):
            layer.mlp.down_proj = Doubled(layer.mlp.down_proj)
        after = logits(model)
        assert error(after, before) > 0.1
        assert len(steps) == 2 * STEPS
        assert torch.equal(after, logits(unfused(model)))

    def test_weights_that_move_are_read_where_they_are(self, checkpoints: dict[str, Path], steps: list[int]) -> None:
        model = load(checkpoints["llama"])
        before = logits(model)
        for layer in layers(model):
            layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 3
        assert error(logits(model), before) > 0.1
        assert error(logits(model), logits(unfused(model))) < 2e-5
        assert len(steps) == 3 * 2 * STEPS

    def test_training_and_gradients(self, checkpoints: dict[str, Path], steps: list[int]) -> None:
        model = load(checkpoints["llama"])
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        out = model(torch.tensor([[8]]), past_key_values=cache).logits
        assert not steps
        assert out.requires_grad
        with torch.no_grad():
            model.train()(torch.tensor([[9]]), past_key_values=cache)
            assert not steps
            model.eval()(torch.tensor([[9]]), past_key_values=cache)
        assert len(steps) == 2

    def test_a_copy_reads_its_own_weights(self, checkpoints: dict[str, Path], steps: list[int]) -> None:
        model = load(checkpoints["qwen3_5"])
        other = copy.deepcopy(model)
        before = logits(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert error(logits(other), before) < 1e-6
        assert len(steps) == 2 * 2 * STEPS


def test_layers_that_can_not_be_fused_say_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = kappaquant.open_source(save_tiny("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16))
    plan = kappaquant.make_plan(
        source.tensors, source.config, policy="uniform", bits=4, overrides=(("*experts.0.*", 16),)
    )
    kappaquant.quantize(source, tmp_path / "out", plan)
    with caplog.at_level(logging.WARNING, "kappaquant"):
        model = load(tmp_path / "out")
    assert len(layers(model)) == 1
    assert "model.layers.0: not fused: its experts are not packed in one format" in caplog.text
    assert fuse(torch.nn.Linear(2, 2)) == []


def swapped(name: str, tensor: torch.Tensor) -> Any:
    def swap(layer: Any) -> None:
        module, _, parameter = name.rpartition(".")
        vars(layer.get_submodule(module))["_parameters"][parameter] = torch.nn.Parameter(tensor, requires_grad=False)

    return swap


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swapped("self_attn.q_norm.weight", torch.ones(16)), "weight of Qwen3RMSNorm has shape [16], not [32]"),
        (swapped("post_attention_layernorm.weight", torch.ones(64)), "has shape [64], not [128]"),
        (swapped("input_layernorm.weight", torch.ones(128).double()), "is torch.float64, not one of torch.float32"),
        (swapped("self_attn.q_proj.bias", torch.ones(256)[::2]), "bias of QuantLinear does not lie in one piece"),
        (swapped("self_attn.k_proj.bias", torch.ones(3)), "bias of QuantLinear has shape [3], not [64]"),
        (lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()), "its MLP's activation is GELU, not silu"),
        (lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Identity()), "up_proj is Identity, not a linear layer"),
        (
            lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Linear(128, 8, bias=False)),
            "weight of Linear has shape [8, 128]",
        ),
    ],
)
def test_tensors_of_another_size_never_reach_native_code(
    change: Any, reason: str, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture, steps: list[int]
) -> None:
    model = load(checkpoints["qwen3"])
    first, _ = layers(model)
    change(first)
    with caplog.at_level(logging.WARNING, "kappaquant"), torch.no_grad():
        assert fuse(unfused(model)) == ["model.layers.1"]
        assert reason in caplog.text
        first.forward = native.NativeLayer(first)
        cache = transformers.DynamicCache(config=model.config)
        with contextlib.suppress(RuntimeError):  # torch may refuse it
            model.model(torch.tensor([[5]]), past_key_values=cache)
    assert len(steps) <= 1


def test_more_experts_than_there_are_never_reach_native_code(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = unfused(load(checkpoints["qwen3_5_moe_text"]))
    model.model.layers[0].mlp.gate.top_k = 6
    with caplog.at_level(logging.WARNING, "kappaquant"):
        assert fuse(model) == ["model.layers.1"]
    assert "its router takes 6 of 5 experts" in caplog.text


def test_no_core_no_word(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = unfused(load(checkpoints["llama"]))
    monkeypatch.setattr(native, "absence", lambda: "no compiler")
    with caplog.at_level(logging.WARNING, "kappaquant"):
        assert fuse(model) == []
    assert not caplog.text
