"""Real tq3_native files, made by the published tool, decode bit for bit; what we write is read the same way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from choices import choice
from planned import OUT, TENSORS, Q, plan
from published import Published, bundled, digest, each_folder, each_set
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant.checkpoints.open import container_by_id
from kappaquant.errors import PlanError
from kappaquant.formats.codebook import published_codebook
from kappaquant.formats.signs import signs
from kappaquant.models.roles import kind_of


def decode_by_the_book(codes: torch.Tensor, norms: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Codes [n, group] and norms [n] to weights, float64, by the definition."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < group:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    s1, s2 = (torch.tensor(s, dtype=torch.float64) for s in signs(group))
    centroids = torch.tensor(published_codebook(bits, group), dtype=torch.float64)
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


@each_folder(Published.decoded)
def test_published_files_decode_bit_for_bit(published: Published, folder: str) -> None:
    checkpoint, expected = published.open(folder), published.decoded(folder)
    assert {n for n in checkpoint.keys() if checkpoint.format_of(n)} == set(expected)
    for name, sha256 in expected.items():
        assert digest(checkpoint.dequantize(name)) == sha256, name


def test_the_bundled_set_holds_each_kind_of_published_file() -> None:
    found = {f: bundled.open(f) for f in bundled.folders()}
    widths = {f: {c.bits(n) for n in c.keys()} - {16} for f, c in found.items()}
    assert {"uniform_b2_g128": {2}, "uniform_b3_g128": {3}, "uniform_b3_g32": {3}}.items() <= widths.items()
    assert {"recipe_as_published": {3, 4}, "uniform_b5_g128": {5}, "b3_sharded": {3}}.items() <= widths.items()
    assert all(found["uniform_b5_g128"].entry(n).byte_codes for n in bundled.decoded("uniform_b3_g128"))
    assert {f for f in found if bundled.decoded(f)} == set(found) - {"uniform_b3_g32", "uniform_b5_g128"}
    apart = [e for e in found["b3_sharded"].entries.values() if len({path for path, _ in e.parts.values()}) == 2]
    assert [e.info.shape for e in apart] == [(3, 128, 16)]
    assert sum(p.stat().st_size for p in bundled.root.rglob("*") if p.is_file()) <= 300_000


@each_folder()
def test_published_files_decode_by_the_definition(published: Published, folder: str) -> None:
    checkpoint = published.open(folder)
    stored: dict[str, torch.Tensor] = {}
    for shard in (published.root / folder).glob("*.safetensors"):
        stored.update(load_file(shard))
    group = json.loads((published.root / folder / "tq_config.json").read_text())["group_size"]
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


@each_set
def test_a_config_that_lies_about_bits_is_reported(published: Published) -> None:
    recipe = published.open("recipe_as_published")
    assert any("claims 4 bits" in n and "3 bits" in n for n in recipe.notices)
    assert {recipe.bits(n) for n in recipe.keys()} == {3, 4, 16}
    if "recipe_intended" in published.folders():
        assert published.open("recipe_intended").notices == []


@each_set
def test_a_stale_index_beside_a_single_file_is_tolerated_and_reported(published: Published, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published.root / "uniform_b3_g128", tmp_path / "stale"))
    shutil.copy(published.root / "b3_sharded" / "model.safetensors.index.json", folder)
    checkpoint = kappaquant.open_checkpoint(folder, source=published.source)
    assert any("stale" in n for n in checkpoint.notices)
    assert digest(checkpoint.dequantize("mtp.fc.weight")) == published.decoded("uniform_b3_g128")["mtp.fc.weight"]


@each_set
def test_without_shapes_a_folder_says_what_to_give(published: Published) -> None:
    with pytest.raises(kappaquant.FormatError, match="original model as source"):
        kappaquant.open_checkpoint(published.root / "uniform_b3_g128")


@each_folder(lambda _, folder: folder.startswith("uniform") and folder.endswith("g128"))
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_what_we_write_is_as_near_to_the_source_as_what_is_published(
    published: Published, folder: str, effort: str, tmp_path: Path
) -> None:
    tensors = load_file(published.source / "model.safetensors")
    del tensors["edge.fp16overflow.bias"]  # float16 cannot hold it, which is an error of its own
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    shutil.copy(published.source / "config.json", tmp_path / "source")
    source = kappaquant.open_source(tmp_path / "source")
    reference = published.open(folder)
    names = [n for n in reference.keys() if reference.format_of(n)]
    bits = reference.bits(names[0])
    source.config["model_type"] = "qwen3_5_moe"  # whose tensors the synthetic source mixes
    names = [n for n in names if not kind_of(n, source.tensors[n], source.config).refuse]
    assert len(names) > 15
    choices = {n: choice(bits if n in names else 16) for n in source.tensors}
    plan = kappaquant.Plan(choices, 128, "by hand", {})
    options = kappaquant.Options(effort=effort, container="tq3_native")  # type: ignore[arg-type]
    written = kappaquant.open_checkpoint(
        kappaquant.quantize(source, tmp_path / "out", plan, options), source=published.source
    )
    ours = theirs = energy = 0.0
    for name in names:
        weight = tensors[name].double()
        ours += float((written.dequantize(name) - weight).square().sum())
        theirs += float((reference.dequantize(name) - weight).square().sum())
        energy += float(weight.square().sum())
    assert ours <= 1.002 * theirs
    if effort == "fast":  # the same method but for the least-squares norm
        assert ours / energy == pytest.approx(theirs / energy, rel=0.05)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    theirs_stored = load_file(published.root / folder / "model.safetensors")
    for key in (f"{n}{end}" for n in names for end in (".tq_packed", ".tq_norms")):
        tensor = stored[key]
        assert (tensor.shape, tensor.dtype) == (theirs_stored[key].shape, theirs_stored[key].dtype), key


@each_set
def test_a_float_that_float16_cannot_hold_is_an_error(published: Published, tmp_path: Path) -> None:
    source = kappaquant.open_source(published.source)
    source.config["model_type"] = "qwen3_5_moe"  # whose tensors the synthetic source mixes
    plan = kappaquant.make_plan(source.tensors, source.config, group_size=128)
    with pytest.raises(kappaquant.NonFiniteError, match=r"edge\.fp16overflow\.bias.*65504"):
        kappaquant.quantize(source, tmp_path / "out", plan, kappaquant.Options(container="tq3_native"))
    assert not (tmp_path / "out").exists()


def test_what_tq3_native_cannot_hold() -> None:
    def check_legacy(made):
        container_by_id("tq3_native").check_plan(made, TENSORS)

    check_legacy(plan(overrides=[(Q, 2), (OUT, 4)]))
    check_legacy(plan(bits=8))
    with pytest.raises(PlanError, match="keeps every tensor"):
        check_legacy(plan(bits=16))
    with pytest.raises(PlanError, match=r"q_proj\.weight: 5 bits beside other widths"):
        check_legacy(plan(overrides=[(Q, 5)]))
    with pytest.raises(PlanError, match="6 bits beside"):
        check_legacy(plan(bits=5, overrides=[(Q, 6)]))
    with pytest.raises(
        PlanError, match=r"groups of 64 \(.*q_proj.*\), 128 \(.*\); tq3_native has one group size: .*--group-size 128"
    ):
        check_legacy(plan(overrides=[(Q, "tq3g64")]))
