"""Layers one at a time make the hidden states that the whole model makes; models that are not made of such layers say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import kappaquant
from benchmarks import architectures
from benchmarks.tiny_architectures import tiny
from kappaquant.errors import UnsupportedError
from kappaquant.models.skeleton import load_config, model_class
from kappaquant.quantizing.calibration.layers import Layers

TEXT = [(a, e) for a, e in tiny_models.LAYOUTS if a not in ("gemma3_text", "gemma3", "qwen3_5_moe")]


@pytest.mark.parametrize(("architecture", "experts"), TEXT)
def test_hidden_states_are_the_whole_models(architecture: str, experts: tiny_models.Experts, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny(architecture, tmp_path / "source", experts=experts)
    check(folder)


@pytest.mark.parametrize(
    "architecture",
    ["deepseek_v3", "gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("afmoe", "granitemoehybrid", "kimi_k25", "longcat_flash", "minimax", "olmo2", "phi3", "qwen3_next"))],
)  # fmt: skip
def test_hidden_states_of_architectures_without_a_table(architecture: str, tmp_path: Path) -> None:
    config = tiny(architecture)
    torch.manual_seed(0)
    architectures._random(model_class(config)(config)).float().save_pretrained(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("lfm2", "does not know how to go through its layers one by one"), ("kimi_linear", "transformers rearranges this tensor")],
)  # fmt: skip
def test_what_cannot_be_gone_through_is_refused(architecture: str, reason: str, tmp_path: Path) -> None:
    config = tiny(architecture)
    architectures._random(model_class(config)(config)).float().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=f"{reason}.*quantize without"):
        first_layer(tmp_path)


def first_layer(folder: Path) -> None:
    layers = Layers(kappaquant.open_source(folder), "cpu", torch.float32)
    layers.load(0)
    states, calls = layers.embed(torch.zeros(1, 4, dtype=torch.int64))
    list(layers.forward(0, states, calls))


def check(folder: Path) -> None:
    """Of each layer of a saved model, against the whole model."""
    layers = Layers(kappaquant.open_source(folder), "cpu", torch.float32)
    windows = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))
    states, calls = layers.embed(windows)
    for number in range(len(layers)):
        layers.load(number)
        states = list(layers.forward(number, states, calls))
        layers.unload(number)
        assert all(p.is_meta for p in layers.model.get_submodule(layers.prefixes[number][:-1]).parameters())
    config = load_config(folder)
    model: Any = model_class(config).from_pretrained(folder, config=config, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.get_decoder().norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(windows)
    torch.testing.assert_close(torch.cat(states), seen[0], rtol=1e-4, atol=1e-4)
