"""tq3_native to v1 without a bit lost: codes, norms, codebooks and kept tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import quantize
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import FormatError, OutputError, PlanError, UnsupportedError
from kappaquant.exports.kappaquant_v1 import convert
from kappaquant.formats.codebook import LEGACY_FORMAT, legacy_codebook


@pytest.fixture
def legacy(tmp_path: Path) -> kappaquant.Checkpoint:
    source = save_tiny("qwen3_moe", tmp_path / "source", experts="fused")
    return quantize(source, tmp_path / "legacy", target=LEGACY_FORMAT)


def assert_same(old: kappaquant.Checkpoint, new: kappaquant.Checkpoint) -> None:
    assert new.format == "kappaquant"
    assert new.keys() == old.keys()
    for name in old.keys():
        assert (new.bits(name), new.shape(name)) == (old.bits(name), old.shape(name))
        assert torch.equal(new.dequantize(name), old.dequantize(name)), name
        if old.format_of(name) is None:
            assert torch.equal(new.tensor(name), old.tensor(name))
        else:
            assert torch.equal(new.packed(name), old.packed(name))
            assert new.codebook(name) == old.codebook(name) != new.format_of(name).codebook


def test_every_bit_survives(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    new = kappaquant.open_checkpoint(convert(legacy, tmp_path / "v1"))
    assert_same(legacy, new)
    for name in new.keys():
        if new.format_of(name):
            assert torch.equal(new.norms(name), legacy.norms(name))
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
            assert torch.equal(new.packed(name), legacy.packed(name))
            assert torch.equal(new.norms(name), legacy.norms(name).half())
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
    monkeypatch.setattr("kappaquant.exports.plain.SHARD_BYTES", 20_000)
    new = kappaquant.open_checkpoint(convert(legacy, tmp_path / "v1"))
    assert_same(legacy, new)
    assert len({path for entry in new.entries.values() for path, _ in entry.parts}) > 2
    for entry in new.entries.values():
        assert len({path for path, _ in entry.parts}) == 1


def test_what_is_refused(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="norms 'BF16': must be one of F32, F16"):
        convert(legacy, tmp_path / "v1", "BF16")
    with pytest.raises(OutputError, match="lies in the checkpoint"):
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
    marker = {"format": LEGACY_FORMAT, "bits": 1, "group_size": 128, "quantizer_seed": 42, "compressed_layers": 1}
    (folder / "tq_config.json").write_text(json.dumps(marker))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    opened = kappaquant.open_checkpoint(folder, shapes={name: (4, 128)})
    assert opened.codebook(name)[:2] == legacy_codebook(1, 128)
    with pytest.raises(UnsupportedError, match=rf"{name}: has 1-bit codes"):
        convert(opened, tmp_path / "v1")


@pytest.mark.parametrize("written", ["b3_s4_default", "b3_sharded", "recipe_as_published", "uniform_b2_g128"])
def test_published_files(written: str, tmp_path: Path) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the golden tq3_native files are not beside the repository")
    folder = Path(shutil.copytree(GOLDEN / written, tmp_path / "legacy"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    old = kappaquant.open_checkpoint(folder, source=GOLDEN / "src")
    assert_same(old, kappaquant.open_checkpoint(convert(old, tmp_path / "v1")))


def test_the_command(legacy: kappaquant.Checkpoint, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(legacy.path), "-o", str(tmp_path / "v1"), "--norms", "f16"])
    assert done.exit_code == 0, done.output
    assert "v1" in done.output
    assert kappaquant.open_checkpoint(tmp_path / "v1").format == "kappaquant"
