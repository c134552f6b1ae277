"""Layers one at a time make the hidden states that the whole model makes; models that are not made of such layers say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import kappaquant
from kappaquant.quantizing.calibration.layers import Layers

TEXT = [(a, e) for a, e in tiny_models.LAYOUTS if a not in ("gemma3_text", "gemma3", "qwen3_5_moe")]


@pytest.mark.parametrize(("architecture", "experts"), TEXT)
def test_hidden_states_are_the_whole_models(architecture: str, experts: tiny_models.Experts, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny(architecture, tmp_path / "source", experts=experts)
    layers = Layers(kappaquant.open_source(folder), "cpu", torch.float32)
    windows = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(0))
    states, calls = layers.embed(windows)
    for number in range(len(layers)):
        layers.load(number)
        states = list(layers.forward(number, states, calls))
        layers.unload(number)
        assert all(p.is_meta for p in layers.model.get_submodule(layers.prefixes[number][:-1]).parameters())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.get_decoder().norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(windows)
    torch.testing.assert_close(torch.cat(states), seen[0], rtol=1e-4, atol=1e-4)
