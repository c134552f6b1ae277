"""Plain weights are a model whole or not at all: transformers would make up what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_model

from kappaquant.errors import SourceError
from kappaquant.models.plain import plain_model

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_one(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = plain_model(save_tiny(architecture, tmp_path, tied=tied), "auto", "cpu")
    assert not model.training
    expected = tiny_model(architecture, tied=tied).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_tables_that_older_checkpoints_hold_are_no_fault(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    _change(folder, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    plain_model(folder, torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(Q), f"{Q}: LlamaForCausalLM needs it, but it is not there; "),
        (lambda s: s.update(stray=torch.zeros(3)), "stray: LlamaForCausalLM has no place for it; "),
        (lambda s: s.update({Q: torch.zeros(3, 3)}), "transformers loads no LlamaForCausalLM of it"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    _change(folder, change)
    with pytest.raises(SourceError, match=message) as caught:
        plain_model(folder, "auto", "cpu")
    assert "\n" not in str(caught.value)


def test_a_configuration_of_other_sizes(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(SourceError, match=r"model\.layers\.1\..*has no place for it \(nor 8 more\)"):
        plain_model(folder, "auto", "cpu")


def _change(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
