"""What quantize writes: bytes, layout, metadata, and that nothing but the plan and the source decides them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from builders import CONFIG, EXPERTS, Q, digests, quantize, tensors, write_source
from safetensors import safe_open
from safetensors.torch import load_file

import kappaquant
from kappaquant.checkpoints.open import container_by_id
from kappaquant.files import tensors as stored_tensors
from kappaquant.formats import codec
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat
from kappaquant.planning.moments import Moments


def test_every_tensor_is_what_the_codec_makes_of_it_or_what_it_was(source: Path) -> None:
    checkpoint = quantize(source, source.parent / "out", "recipe", effort="fast")
    content = tensors()
    assert set(checkpoint.keys()) == set(content)
    quantized = 0
    for name, weight in content.items():
        fmt = checkpoint.format_of(name)
        assert checkpoint.shape(name) == tuple(weight.shape)
        if fmt is None:
            kept = checkpoint.tensor(name)
            assert kept.dtype == weight.dtype
            assert torch.equal(kept, weight)
            continue
        quantized += 1
        expected = codec.encode(weight, fmt, "fast")
        assert torch.equal(checkpoint.parts(name)[PACKED_SUFFIX], expected.packed)
        assert torch.equal(checkpoint.parts(name)[NORMS_SUFFIX], expected.norms)
        decoded = codec.decode(expected.packed, expected.norms, fmt, weight.shape[-1])
        assert torch.equal(checkpoint.dequantize(name), decoded)
        assert torch.equal(checkpoint.entry(name).read_rows(3, 9), decoded.view(-1, weight.shape[-1])[3:9])
    assert quantized == 8
    assert {checkpoint.bits(n) for n in content} == {3, 4, 16}


def test_folder_and_metadata(source: Path) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, "recipe")
    out = kappaquant.quantize(opened, source.parent / "out", plan)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "extra" / "LICENSE").read_text() == "as you like"
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == {**CONFIG, "transformers_weights": "import-kappaquant-first.safetensors"}
    assert quantization["tensors"][Q] == "tq4g128"
    assert quantization["tensors"][EXPERTS] == "tq3g128"
    assert quantization["tensors"]["model.steps"] == "I64"
    assert set(quantization["tensors"]) == set(opened.tensors)
    assert {k: tuple(v) for k, v in quantization["codebooks"].items()} == {
        f"tq{b}g128": CodebookFormat(b, 128).codebook for b in (3, 4)
    }
    manifest = json.loads((out / "kappaquant.json").read_text())
    assert manifest["source"] == {"model": "source", "revision": None}
    assert manifest["plan"] == json.loads(plan.record())
    content = tensors()
    for name, entry in manifest["tensors"].items():
        assert entry["shape"] == list(content[name].shape)
        assert entry["bits"] == plan.bits(name)
    entry = manifest["tensors"][Q]
    assert entry["kurtosis"] == pytest.approx(Moments.of(content[Q]).kurtosis, rel=1e-5)
    assert entry["relative_mse"] == pytest.approx(
        codec.encode(content[Q], CodebookFormat(4, 128)).relative_mse, rel=1e-5
    )
    stored = {}
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:  # an independent reader of the format
            stored.update({name: file.get_tensor(name) for name in file.keys()})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored) == set(manifest["sha256"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    for name, tensor in stored.items():
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        assert hashlib.sha256(raw).hexdigest() == manifest["sha256"][name], name
    assert container_by_id("kappaquant").output_bytes(opened.shards, plan.format_of) == sum(
        p.stat().st_size for p in out.glob("*.safetensors")
    )


def test_source_shards_keep_their_names_and_parameters(source: Path) -> None:
    opened = kappaquant.open_source(source)
    checkpoint = quantize(source, source.parent / "out")
    for name in checkpoint.keys():
        assert {path.name for path, _ in checkpoint.entry(name).parts.values()} == {opened.shard_of[name]}


def test_jobs_repetition_and_cutting_do_not_change_a_byte(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(quantize(source, source.parent / "one", jobs=1).path)
    assert digests(quantize(source, source.parent / "again", jobs=1).path) == expected
    assert digests(quantize(source, source.parent / "two", jobs=2).path) == expected
    monkeypatch.setattr(stored_tensors, "SLICE_ELEMENTS", 3000)
    cut = digests(quantize(source, source.parent / "cut", jobs=1).path)
    del cut["kappaquant.json"], expected["kappaquant.json"]  # sums in another order may round otherwise
    assert cut == expected


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 256), (4, 0), (7, 100), (3, 50, 64), (1, 5000)])
def test_cuts_cover_a_tensor_in_whole_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "SLICE_ELEMENTS", 1000)
    cuts = list(stored_tensors.ranges(shape))
    total = torch.Size(shape).numel()
    assert [c for pair in cuts for c in range(*pair)] == list(range(total))
    assert all(start % (shape[-1] if shape else 1) == 0 for start, _ in cuts)


@pytest.mark.parametrize("group", [32, 256])
def test_other_groups(source: Path, group: int) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, bits=5, group_size=group)
    out = kappaquant.quantize(opened, source.parent / "out", plan)
    checkpoint = kappaquant.open_checkpoint(out)
    assert checkpoint.format_of(Q) == CodebookFormat(5, group)
    weight = tensors()[Q].float()
    assert float((checkpoint.dequantize(Q) - weight).square().sum() / weight.square().sum()) < 0.003


def test_tq3_native_layout(source: Path) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, "recipe")
    out = kappaquant.quantize(opened, source.parent / "out", plan, kappaquant.Options(container="tq3_native"))
    assert not (out / "kappaquant.json").exists()
    marker = json.loads((out / "tq_config.json").read_text())
    assert marker["bits"] == 3
    assert marker["sensitive_bits"] == 4
    assert Q in marker["sensitive_patterns"]
    assert marker["compressed_layers"] == 8
    stored = {n: t for p in out.glob("*.safetensors") for n, t in load_file(p).items()}
    assert stored[f"{EXPERTS}.tq_packed"].shape == (4 * 64 * 2, 48)
    assert stored[f"{EXPERTS}.tq_norms"].shape == (4 * 64, 2)
    assert stored[f"{EXPERTS}.tq_norms"].dtype == torch.float32
    assert stored["model.norm.weight"].dtype == torch.float16
    assert stored["model.steps"].dtype == torch.int64
    checkpoint = kappaquant.open_checkpoint(out, source=source)
    assert checkpoint.notices == []
    assert checkpoint.bits(Q) == 4
    assert checkpoint.shape(EXPERTS) == (4, 64, 256)


@pytest.mark.parametrize("bits", [5, 8])
def test_tq3_native_with_a_byte_per_code(source: Path, bits: int) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, bits=bits)
    out = kappaquant.quantize(opened, source.parent / "out", plan, kappaquant.Options(container="tq3_native"))
    checkpoint = kappaquant.open_checkpoint(out, source=source)
    assert checkpoint.bits(Q) == bits
    weight = tensors()[Q].float()
    assert float((checkpoint.dequantize(Q) - weight).square().sum() / weight.square().sum()) < 0.003
    mixed = kappaquant.make_plan(opened.tensors, opened.config, bits=bits, overrides=[(Q, 3)])
    with pytest.raises(kappaquant.PlanError, match="beside other widths"):
        kappaquant.quantize(opened, source.parent / "mixed", mixed, kappaquant.Options(container="tq3_native"))


def test_progress_ends_at_the_total(source: Path) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config)
    seen: dict[str, list[tuple[int, int]]] = {}
    kappaquant.quantize(
        opened,
        source.parent / "out",
        plan,
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    assert set(seen) == {"encode", "hash"}
    for steps in seen.values():
        assert [d for d, _ in steps] == sorted(d for d, _ in steps)
        assert steps[-1][0] == steps[-1][1] > 0


def test_empty_tensors_are_kept(tmp_path: Path) -> None:
    content = tensors()
    checkpoint = quantize(write_source(tmp_path / "source", content), tmp_path / "out")
    for name in (
        "model.scalar",
        "model.steps",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.k_proj.weight",
    ):
        assert checkpoint.bits(name) == 16
        assert torch.equal(checkpoint.tensor(name), content[name])
        assert checkpoint.tensor(name).shape == content[name].shape
