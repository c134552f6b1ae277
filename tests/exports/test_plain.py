"""Dequantized folders: plain safetensors that equal what the checkpoint decodes to."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from builders import CONFIG, Q, digests, quantize, tensors, write_source
from safetensors.torch import load_file

import kappaquant
from kappaquant.checkpoints import layout
from kappaquant.exports import plain as export
from kappaquant.files import unfinished as journal


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
    monkeypatch.setattr(layout, "SHARD_BYTES", 100_000)
    export.dequantize(checkpoint, tmp_path / "plain")
    source = kappaquant.open_source(tmp_path / "plain")
    assert len(source.shards) > 2
    assert set(source.tensors) == set(checkpoint.keys())


def test_bad_outputs(checkpoint: kappaquant.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(kappaquant.PlanError, match="BF16, F16, F32"):
        export.dequantize(checkpoint, tmp_path / "plain", "I8")
    with pytest.raises(kappaquant.OutputError, match=r"lies in .*, which is read"):
        export.dequantize(checkpoint, checkpoint.path / "plain")
    with pytest.raises(kappaquant.OutputError, match="not empty"):
        export.dequantize(checkpoint, tmp_path / "source")
    assert not (tmp_path / "source.partial").exists()


def test_weights_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    content = {**tensors(), Q: torch.randn(96, 256) * 1e6}
    opened = kappaquant.open_source(write_source(tmp_path / "source", content))
    plan = kappaquant.make_plan(opened.tensors, opened.config)
    out = kappaquant.quantize(opened, tmp_path / "out", plan, kappaquant.Options(container="tq3_native"))
    checkpoint = kappaquant.open_checkpoint(out, source=tmp_path / "source")
    with pytest.raises(kappaquant.PlanError, match=rf"{Q}: .*too large for F16; choose BF16 or F32"):
        export.dequantize(checkpoint, tmp_path / "plain")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    export.dequantize(checkpoint, tmp_path / "plain", "F32")
    assert torch.equal(read(tmp_path / "plain")[Q], checkpoint.dequantize(Q))


@pytest.mark.parametrize("moment", ["allocate", "pwrite"])
def test_full_disk(
    checkpoint: kappaquant.Checkpoint, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((journal, "allocate", full) if moment == "allocate" else (os, "pwrite", full)))
        with pytest.raises(kappaquant.OutputError, match="free space and run again"):
            export.dequantize(checkpoint, tmp_path / "plain")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    export.dequantize(checkpoint, tmp_path / "plain")


def test_killed_and_started_again(
    checkpoint: kappaquant.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(export.dequantize(checkpoint, tmp_path / "expected"))

    def killed(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.dequantize(checkpoint, tmp_path / "plain", None, killed)
    assert not (tmp_path / "plain").exists()
    assert digests(export.dequantize(checkpoint, tmp_path / "plain")) == expected
    assert not (tmp_path / "plain.partial").exists()
