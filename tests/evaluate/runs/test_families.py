"""Families of weights put into the original alone: together they are the checkpoint, and the original is as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_models import character_tokenizer, save_tiny
from tiny_pair import EXACT, TEXT, measure, quantized

import kappaquant
from kappaquant import evaluate
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.runs.families import packed_families, replaced
from kappaquant.evaluate.runs.pair import open_pair
from kappaquant.evaluate.runs.passes import load_original


@pytest.mark.parametrize("experts", ["split", "fused"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_5_moe_text"])
def test_families_alone_and_together(architecture: str, experts: Any, tmp_path: Path) -> None:
    folder = save_tiny(architecture, tmp_path / "source", experts=experts)
    character_tokenizer().save_pretrained(folder)
    (folder / "evaluation.txt").write_text(TEXT[:80], encoding="utf-8")
    packed = quantized(folder, tmp_path / "q3")
    found = measure(packed, folder, tmp_path / "logits", dataclasses.replace(EXACT, by_layer=True))
    families = packed_families(kappaquant.open_checkpoint(packed))
    assert found.families is not None
    assert [f.family for f in found.families] == list(families)
    assert all(f.mean > 1e-5 for f in found.families)
    assert all(3.1 < f.bits < 4.5 for f in found.families)  # rows of 192 are padded to 256

    pair = open_pair(packed, folder)
    model = load_original(pair, "float32", "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for of_one in families.values() for name in of_one]
    sequences = evaluate.windows(character_tokenizer(), [TEXT[:80]], 40)
    with replaced(model, kappaquant.open_checkpoint(packed), pair.source, names):
        together = evaluate.kl_divergence(model, load_original(pair, "float32", "cpu"), sequences)
    assert together.mean == pytest.approx(found.divergence.mean, rel=1e-3)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_family_that_cannot_stand_alone_is_named(checkpoint: Path, source: Path) -> None:
    pair = open_pair(checkpoint, source)
    name = "model.layers.0.self_attn.q_proj.weight"
    del pair.source.tensors[name]
    model = load_original(pair, "float32", "cpu")
    with (
        pytest.raises(UnsupportedError, match=f"{name}: cannot be put into a Qwen3MoeForCausalLM alone"),
        replaced(model, kappaquant.open_checkpoint(checkpoint), pair.source, [name]),
    ):
        pass
