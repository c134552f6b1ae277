"""Dequantized folders: plain safetensors that equal what the checkpoint decodes to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import CONFIG, Q, quantize, write_source
from safetensors.torch import load_file

import kappaquant
from kappaquant import export


@pytest.fixture
def checkpoint(tmp_path: Path) -> kappaquant.Checkpoint:
    return quantize(write_source(tmp_path / "source", shards=2), tmp_path / "out")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", [None, "F32", "F16", "BF16"])
def test_dequantize(checkpoint: kappaquant.Checkpoint, dtype: str | None, tmp_path: Path) -> None:
    export.dequantize(checkpoint, tmp_path / "plain", dtype)
    content = read(tmp_path / "plain")
    assert set(content) == set(checkpoint.keys())
    wanted = {None: torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    assert content[Q].dtype == wanted
    for name, tensor in content.items():
        expected = (
            checkpoint.dequantize(name).to(tensor.dtype) if checkpoint.format_of(name) else checkpoint.tensor(name)
        )
        assert torch.equal(tensor, expected), name
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "plain" / "tokenizer.json").exists()
    assert not (tmp_path / "plain" / "kappaquant.json").exists()
    kappaquant.open_source(tmp_path / "plain")  # well-formed, and no longer "already quantized"


def test_large_models_are_cut_into_shards(
    checkpoint: kappaquant.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    export.dequantize(checkpoint, tmp_path / "plain")
    source = kappaquant.open_source(tmp_path / "plain")
    assert len(source.shards) > 2
    assert set(source.tensors) == set(checkpoint.keys())


def test_bad_outputs(checkpoint: kappaquant.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(kappaquant.PlanError, match="BF16, F16, F32"):
        export.dequantize(checkpoint, tmp_path / "plain", "I8")
    with pytest.raises(kappaquant.OutputError, match="lies in the checkpoint"):
        export.dequantize(checkpoint, checkpoint.path / "plain")
    with pytest.raises(kappaquant.OutputError, match="not empty"):
        export.dequantize(checkpoint, tmp_path / "source")
    assert not (tmp_path / "source.partial").exists()
