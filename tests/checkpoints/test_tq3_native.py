"""Real tq3_native files, made by the published tool, decode bit for bit; what we write is read the same way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant.formats.codebook import legacy_codebook, signs
from kappaquant.models.roles import kind_of
from kappaquant.planning.plan import Choice

SOURCE = GOLDEN / "src"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the published tool's files are not beside this repository")

FOLDERS = sorted(p.name for p in GOLDEN.iterdir() if (p / "tq_config.json").exists()) if GOLDEN.is_dir() else []
WITH_EXPECTED = [name for name in FOLDERS if (GOLDEN / name / "expected_f32.dequant").exists()]


def decode_by_the_book(codes: torch.Tensor, norms: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Codes [n, group] and norms [n] to weights, float64, by the definition."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < group:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    s1, s2 = (torch.tensor(s, dtype=torch.float64) for s in signs(group))
    centroids = torch.tensor(legacy_codebook(bits, group), dtype=torch.float64)
    return (s2 * centroids[codes]) @ (h / group**0.5) * s1 * norms.double()[:, None]


def bit_by_bit(packed: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Codes [n, group] from the bytes of n groups."""
    if packed.shape[1] == group:
        return packed.long()
    rows = []
    for row in packed.tolist():
        stream = int.from_bytes(bytes(row), "little")
        rows.append([stream >> (i * bits) & (2**bits - 1) for i in range(group)])
    return torch.tensor(rows)


@pytest.mark.parametrize("folder", WITH_EXPECTED)
def test_published_files_decode_bit_for_bit(folder: str) -> None:
    checkpoint = kappaquant.open_checkpoint(GOLDEN / folder, source=SOURCE)
    expected = load_file(GOLDEN / folder / "expected_f32.dequant")
    assert {n for n in checkpoint.keys() if checkpoint.format_of(n)} == set(expected)
    for name, weight in expected.items():
        decoded = checkpoint.dequantize(name)
        assert decoded.shape == weight.shape
        assert float((decoded - weight).abs().max()) == 0.0, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_published_files_decode_by_the_definition(folder: str) -> None:
    checkpoint = kappaquant.open_checkpoint(GOLDEN / folder, source=SOURCE)
    stored: dict[str, torch.Tensor] = {}
    for shard in (GOLDEN / folder).glob("*.safetensors"):
        stored.update(load_file(shard))
    group = json.loads((GOLDEN / folder / "tq_config.json").read_text())["group_size"]
    quantized = [n for n in checkpoint.keys() if checkpoint.format_of(n)]
    assert quantized
    for name in quantized:
        packed, norms = stored[f"{name}.tq_packed"], stored[f"{name}.tq_norms"]
        codes = bit_by_bit(packed, checkpoint.bits(name), group)
        rows = decode_by_the_book(codes, norms.flatten(), checkpoint.bits(name), group).view(norms.shape[0], -1)
        shape = checkpoint.shape(name)
        expected = rows[:, : shape[-1]].reshape(shape)
        difference = (checkpoint.dequantize(name).double() - expected).abs().amax(-1)
        assert (difference <= 2e-6 * expected.abs().amax(-1)).all(), name
    assert list(checkpoint.verify()) == []


def test_a_config_that_lies_about_bits_is_reported() -> None:
    published = kappaquant.open_checkpoint(GOLDEN / "recipe_as_published", source=SOURCE)
    assert any("claims 4 bits" in n and "3 bits" in n for n in published.notices)
    intended = kappaquant.open_checkpoint(GOLDEN / "recipe_intended", source=SOURCE)
    assert intended.notices == []
    assert {published.bits(n) for n in published.keys()} == {3, 4, 16}


def test_a_stale_index_beside_a_single_file_is_tolerated_and_reported(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "uniform_b3_g128", tmp_path / "stale")
    shutil.copy(GOLDEN / "b3_sharded" / "model.safetensors.index.json", folder)
    checkpoint = kappaquant.open_checkpoint(folder, source=SOURCE)
    assert any("stale" in n for n in checkpoint.notices)
    assert float(checkpoint.dequantize("mtp.fc.weight").abs().max()) > 0


def test_without_shapes_a_folder_says_what_to_give() -> None:
    with pytest.raises(kappaquant.FormatError, match="original model as source"):
        kappaquant.open_checkpoint(GOLDEN / "uniform_b3_g128")


@pytest.mark.parametrize(("bits", "folder"), [(2, "uniform_b2_g128"), (3, "uniform_b3_g128"), (4, "uniform_b4_g128"),
                                              (5, "uniform_b5_g128")])  # fmt: skip
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_what_we_write_is_as_near_to_the_source_as_what_is_published(
    bits: int, folder: str, effort: str, tmp_path: Path
) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    del tensors["edge.fp16overflow.bias"]  # float16 cannot hold it, which is an error of its own
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    shutil.copy(SOURCE / "config.json", tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    published = kappaquant.open_checkpoint(GOLDEN / folder, source=SOURCE)
    names = [n for n in published.keys() if published.format_of(n)]
    source.config["model_type"] = "qwen3_5_moe"  # whose tensors the synthetic source mixes
    names = [n for n in names if not kind_of(n, source.tensors[n], source.config).refuse]
    assert len(names) > 15
    choices = {n: Choice(bits if n in names else 16, "as published") for n in source.tensors}
    plan = kappaquant.Plan(choices, 128, "by hand", {})
    options = kappaquant.Options(effort=effort, target="tq3_native")  # type: ignore[arg-type]
    written = kappaquant.open_checkpoint(kappaquant.quantize(source, tmp_path / "out", plan, options), source=SOURCE)
    ours = theirs = energy = 0.0
    for name in names:
        weight = tensors[name].double()
        ours += float((written.dequantize(name) - weight).square().sum())
        theirs += float((published.dequantize(name) - weight).square().sum())
        energy += float(weight.square().sum())
    assert ours <= 1.002 * theirs
    if effort == "fast":  # the same method but for the least-squares norm
        assert ours / energy == pytest.approx(theirs / energy, rel=0.05)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    theirs_stored = load_file(GOLDEN / folder / "model.safetensors")
    for key in (f"{n}{end}" for n in names for end in (".tq_packed", ".tq_norms")):
        tensor = stored[key]
        assert (tensor.shape, tensor.dtype) == (theirs_stored[key].shape, theirs_stored[key].dtype), key


def test_a_float_that_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    source = kappaquant.open_source(SOURCE)
    plan = kappaquant.make_plan(source.tensors, {**source.config, "model_type": "qwen3_5_moe"})
    with pytest.raises(kappaquant.NonFiniteError, match=r"edge\.fp16overflow\.bias.*65504"):
        kappaquant.quantize(source, tmp_path / "out", plan, kappaquant.Options(target="tq3_native"))
    assert not (tmp_path / "out").exists()
