"""A checkpoint of a causal language model loaded as its base model, or with another head, as transformers loads the bf16 one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import quantize
from tiny_models import save_tiny

import kappaquant
from kappaquant.errors import FormatError
from kappaquant.models import heads
from kappaquant.models.skeleton import meta_model, place

IDS = torch.arange(3, 20)[None]
ARCHITECTURES = ("llama", "gemma3", "qwen3_moe", "qwen3_5_moe")


def checkpoint(architecture: str, folder: Path, **more: Any) -> Path:
    return quantize(save_tiny(architecture, folder / "source", **more), folder / "quantized")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_base_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = checkpoint(architecture, tmp_path, tied=tied)
    whole, _ = kappaquant.load(folder)
    base = transformers.AutoModel.from_pretrained(folder)
    assert type(base) is type(whole.model)
    assert any(type(module).__name__ == "QuantLinear" for module in base.modules())
    assert not any(p.is_meta for p in base.parameters())
    assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_another_head_is_new(architecture: str, kind: str, tmp_path: Path) -> None:
    folder = checkpoint(architecture, tmp_path)
    whole, _ = kappaquant.load(folder)
    torch.manual_seed(3)
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, num_labels=5)
    hidden = whole.model(IDS).last_hidden_state
    assert torch.equal(model.model(IDS).last_hidden_state, hidden)
    assert model.score.weight.shape == (5, 128)
    assert 0 < model.score.weight.std() < 0.1
    expected = model.score(hidden)
    found = model(IDS).logits
    torch.testing.assert_close(found, expected if kind == "TokenClassification" else expected[:, -1])


def test_a_class_that_names_its_parts_otherwise_is_refused_in_words(tmp_path: Path) -> None:
    """transformers would leave every weight of the bf16 checkpoint aside, and go on with noise."""
    folder = checkpoint("llama", tmp_path)
    with pytest.raises(
        FormatError,
        match=r"LlamaForQuestionAnswering has no place for it .*; load it as what config.json names, LlamaForCausalLM",
    ):
        transformers.AutoModelForQuestionAnswering.from_pretrained(folder)


@pytest.mark.parametrize("through", ["load", "AutoModelForCausalLM"])
def test_the_head_that_predicts_tokens_is_never_made_up(tmp_path: Path, through: str) -> None:
    """A base model alone, as its class saves it: no text comes of it."""
    source = save_tiny("llama", tmp_path / "source")
    state = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in state.items() if name != "lm_head.weight"},
        source / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    if through == "AutoModelForCausalLM":
        config["architectures"] = ["LlamaModel"]
    (source / "config.json").write_text(json.dumps(config))
    folder = quantize(source, tmp_path / "quantized")
    load = kappaquant.load if through == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(FormatError, match=r"lm_head\.weight: LlamaForCausalLM needs it"):
        load(folder)


def test_what_is_nobodys_is_still_a_fault(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    model = transformers.LlamaModel(transformers.LlamaConfig(**config))
    names = [*meta_model(source).state_dict(), "stray.weight"]
    names.remove("model.norm.weight")
    layout = place(model, names)
    assert heads.without_heads(model, layout, names) == "LlamaForCausalLM"
    assert (layout.unexpected, layout.missing, layout.ignored) == (
        ["stray.weight"],
        ["norm.weight"],
        ["lm_head.weight"],
    )
