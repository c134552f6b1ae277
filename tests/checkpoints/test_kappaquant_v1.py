"""Our own checkpoints, damaged: what is missing, misshapen or tampered with is named, and nothing unfinished opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Q, quantize
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant import FormatError, SourceError
from kappaquant.files import unfinished as journal
from kappaquant.files.safetensors import read_header


@pytest.fixture
def checkpoint(source: Path) -> Path:
    return quantize(source, source.parent / "out").path


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of the shard that holds Q."""
    shard = kappaquant.open_checkpoint(folder).entry(Q).parts[".tq_packed"][0]
    content = load_file(shard)
    change(content)
    save_file(content, shard)


def test_tampered_bytes_fail_verify_by_name(checkpoint: Path) -> None:
    for name in (f"{Q}.tq_packed", f"{Q}.tq_norms", "model.norm.weight"):
        copy = shutil.copytree(checkpoint, checkpoint.parent / "copy")
        for path in copy.glob("*.safetensors"):
            stored = read_header(path).get(name)
            if stored:
                data = bytearray(path.read_bytes())
                data[stored.offset] ^= 1
                path.write_bytes(data)
        problems = list(kappaquant.open_checkpoint(copy).verify())
        assert len(problems) == 1
        assert name in problems[0]
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.tq_norms"), rf"{Q}\.tq_norms: missing"),
        (lambda t: t.update({f"{Q}.tq_norms": t[f"{Q}.tq_norms"].float()}), rf"{Q}\.tq_norms: .* holds F32"),
        (lambda t: t.update({f"{Q}.tq_packed": t[f"{Q}.tq_packed"][1:].clone()}), rf"{Q}\.tq_packed: .* expected U8"),
        (lambda t: t.update({"stranger": torch.ones(1)}), "stranger"),
    ],
)
def test_missing_extra_or_misshapen_tensor(checkpoint: Path, change: Any, message: str) -> None:
    rewrite(checkpoint, change)
    with pytest.raises((FormatError, SourceError), match=message):
        kappaquant.open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version 2"),
        ("rotation", "none", "rotation 'none'"),
        ("tensors", None, "lacks its 'tensors'"),
        ("codebooks", {}, "no codebook of 8 ascending values"),
        ("codebooks", {"tq3g128": [1.0] * 7}, "no codebook of 8 ascending values"),
        ("group_size", 64, "not the one kappaquant.json vouches for"),
    ],
)
def test_tampered_config(checkpoint: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"][key] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        kappaquant.open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "file", ["config.json", "kappaquant.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_missing_file(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    with pytest.raises((FormatError, SourceError), match=file.replace(".", r"\.")):
        kappaquant.open_checkpoint(checkpoint)


def test_an_unfinished_output_cannot_be_opened(source: Path) -> None:
    partial = journal.Partial(source.parent / "out", "f")
    with pytest.raises(FormatError):
        kappaquant.open_checkpoint(partial.folder)
    partial.discard()
