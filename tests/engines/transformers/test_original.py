"""The original as a model: where it fits, in the dtype of the device; what is streamed or too large says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

import kappaquant
from kappaquant.engines.transformers import original
from kappaquant.engines.transformers.original import free_memory, load_original, load_tokenizer
from kappaquant.errors import SourceError, UnsupportedError


def test_on_a_cpu_in_float32(tmp_path: Path) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("llama", tmp_path / "tiny", dtype=torch.bfloat16))
    model = load_original(source, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_what_cannot_be_loaded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("llama", tmp_path / "tiny"))
    streamed = replace(source, folder=None)
    with pytest.raises(UnsupportedError, match="leave out --stream, or give --calibration FILE"):
        load_original(streamed, "cpu")
    needed = 4 * sum(info.numel for info in source.tensors.values())
    monkeypatch.setattr(original, "free_memory", lambda device: needed)
    load_original(source, "cpu")
    monkeypatch.setattr(original, "free_memory", lambda device: needed - 1)
    with pytest.raises(UnsupportedError, match=r"GB as float32, cpu has \d+\.\d GB free"):
        load_original(source, "cpu")


def test_a_control_group_bounds_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original, "_CGROUP", tmp_path)
    assert free_memory("cpu") > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\nfile 900\n")
    assert free_memory("cpu") == 3500
    (tmp_path / "memory.stat").write_text("anon 9000\nfile 0\n")
    assert free_memory("cpu") == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory("cpu") > 5000


def test_a_tokenizer_is_never_made_up(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "tiny")
    with pytest.raises(SourceError, match=r"has no tokenizer \(tokenizer\.json"):
        load_tokenizer(kappaquant.open_source(folder))
    tiny_models.character_tokenizer().save_pretrained(folder)
    assert load_tokenizer(kappaquant.open_source(folder))("a b")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="has no tokenizer that transformers can load"):
        load_tokenizer(kappaquant.open_source(folder))
