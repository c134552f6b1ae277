"""tq3_native to v1 without a bit lost: codes, norms, codebooks and kept tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import quantize
from published import Published, each_folder
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from typer.testing import CliRunner

import kappaquant
from kappaquant.checkpoints.tq3_native import TQ3_NATIVE
from kappaquant.cli import app
from kappaquant.errors import FormatError, OutputError, PlanError, UnsupportedError
from kappaquant.exports.kappaquant_v1 import convert
from kappaquant.formats.codebook import FORMATS, NORMS_SUFFIX, PACKED_SUFFIX, published_codebook


@pytest.fixture
def legacy(tmp_path: Path) -> kappaquant.Checkpoint:
    source = save_tiny("qwen3_moe", tmp_path / "source", experts="fused")
    return quantize(source, tmp_path / "legacy", container=TQ3_NATIVE)


def assert_same(old: kappaquant.Checkpoint, new: kappaquant.Checkpoint) -> None:
    assert new.container.id == "kappaquant"
    assert new.keys() == old.keys()
    for name in old.keys():
        assert (new.bits(name), new.shape(name)) == (old.bits(name), old.shape(name))
        assert torch.equal(new.dequantize(name), old.dequantize(name)), name
        if old.format_of(name) is None:
            assert torch.equal(new.tensor(name), old.tensor(name))
        else:
            assert torch.equal(new.parts(name)[PACKED_SUFFIX], old.parts(name)[PACKED_SUFFIX])
            assert (
                new.format_of(name).codebook == old.format_of(name).codebook != FORMATS[new.format_of(name).id].codebook
            )


def test_every_bit_survives(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    new = kappaquant.open_checkpoint(convert(legacy, tmp_path / "v1"))
    assert_same(legacy, new)
    for name in new.keys():
        if new.format_of(name):
            assert torch.equal(new.parts(name)[NORMS_SUFFIX], legacy.parts(name)[NORMS_SUFFIX])
    assert list(new.verify()) == []
    assert (tmp_path / "v1" / "generation_config.json").exists()
    assert not (tmp_path / "v1" / "tq_config.json").exists()


def test_the_converted_model_computes_the_same(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    ids = torch.arange(3, 20)[None]
    convert(legacy, tmp_path / "v1")
    old, new = (kappaquant.load(path, dtype=torch.float32)[0] for path in (legacy.path, tmp_path / "v1"))
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits)


def test_float16_norms_on_request(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    new = kappaquant.open_checkpoint(convert(legacy, tmp_path / "v1", "F16"))
    for name in new.keys():
        if new.format_of(name):
            assert torch.equal(new.parts(name)[PACKED_SUFFIX], legacy.parts(name)[PACKED_SUFFIX])
            assert torch.equal(new.parts(name)[NORMS_SUFFIX], legacy.parts(name)[NORMS_SUFFIX].half())
    assert "norms" not in new.config["quantization_config"]


def test_a_norm_that_float16_cannot_hold_is_named(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    shard = legacy.path / "model.safetensors"
    content = load_file(shard)
    name = "model.layers.0.self_attn.k_proj.weight.tq_norms"
    content[name][0, 0] = 1e5
    save_file(content, shard)
    with pytest.raises(PlanError, match=rf"{name}: a norm is 100000.*--norms f32"):
        convert(kappaquant.open_checkpoint(legacy.path), tmp_path / "v1", "F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["legacy", "source"]
    convert(kappaquant.open_checkpoint(legacy.path), tmp_path / "v1")


def test_packed_and_norms_share_a_shard(
    legacy: kappaquant.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kappaquant.checkpoints.layout.SHARD_BYTES", 20_000)
    new = kappaquant.open_checkpoint(convert(legacy, tmp_path / "v1"))
    assert_same(legacy, new)
    assert len({path for entry in new.entries.values() for path, _ in entry.parts.values()}) > 2
    for entry in new.entries.values():
        assert len({path for path, _ in entry.parts.values()}) == 1


def test_what_is_refused(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="norms 'BF16': must be one of F16, F32"):
        convert(legacy, tmp_path / "v1", "BF16")
    with pytest.raises(OutputError, match=r"lies in .*, which is read"):
        convert(legacy, legacy.path / "v1")
    new = kappaquant.open_checkpoint(convert(legacy, tmp_path / "v1"))
    with pytest.raises(FormatError, match="is kappaquant already"):
        convert(new, tmp_path / "again")
    with pytest.raises(OutputError, match="not empty"):
        convert(legacy, tmp_path / "source")
    legacy.config.clear()
    with pytest.raises(FormatError, match=r"has no config\.json"):
        convert(legacy, tmp_path / "other")


def test_one_bit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "legacy"
    folder.mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    content = {
        f"{name}.tq_packed": torch.zeros(4, 128, dtype=torch.uint8),
        f"{name}.tq_norms": torch.ones(4, 1),
    }
    save_file(content, folder / "model.safetensors")
    marker = {"format": TQ3_NATIVE, "bits": 1, "group_size": 128, "quantizer_seed": 42, "compressed_layers": 1}
    (folder / "tq_config.json").write_text(json.dumps(marker))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    opened = kappaquant.open_checkpoint(folder, shapes={name: (4, 128)})
    assert opened.format_of(name).codebook[:2] == published_codebook(1, 128)
    with pytest.raises(UnsupportedError, match=rf"{name}: has 1-bit codes"):
        convert(opened, tmp_path / "v1")


CONVERTED = ("b3_s4_default", "b3_sharded", "recipe_as_published", "uniform_b2_g128", "uniform_b5_g128")


@each_folder(lambda _, folder: folder in CONVERTED)
def test_published_files(published: Published, folder: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published.root / folder, tmp_path / "legacy"))
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    old = kappaquant.open_checkpoint(copy, source=published.source)
    assert_same(old, kappaquant.open_checkpoint(convert(old, tmp_path / "v1")))


def test_the_command(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(legacy.path), "-o", str(tmp_path / "v1"), "--norms", "f16"])
    assert done.exit_code == 0, done.output
    assert "v1" in done.output
    assert kappaquant.open_checkpoint(tmp_path / "v1").container.id == "kappaquant"
