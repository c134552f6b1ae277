"""Every kind of bad input: one typed error that names the file or tensor, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, EXPERTS, Q, quantize, tensors, write_source
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant import AlreadyQuantizedError, FormatError, NonFiniteError, OutputError, PlanError, SourceError
from kappaquant.files import unfinished as journal
from kappaquant.files.safetensors import read_header
from kappaquant.planning.plan import Choice, Plan


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", shards=2)


def refused(folder: Path, kind: type[Exception], message: str) -> None:
    """Quantizing the folder raises, and leaves nothing beside it."""
    output = folder.parent / "out"
    with pytest.raises(kind, match=message):
        quantize(folder, output)
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def edit_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first_shard(source: Path) -> Path:
    return source / "model-00001-of-00002.safetensors"


# shards


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_shard(source: Path, keep: int) -> None:
    path = first_shard(source)
    path.write_bytes(path.read_bytes()[:keep])
    refused(source, SourceError, path.name)


def test_shard_with_bytes_behind_its_tensors(source: Path) -> None:
    with first_shard(source).open("ab") as file:
        file.write(b"more")
    refused(source, SourceError, "longer than its tensors")


def test_header_that_is_no_json(source: Path) -> None:
    path = first_shard(source)
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xfe\x00{"
    path.write_bytes(data)
    refused(source, SourceError, f"{path.name}.*not JSON")


@pytest.mark.parametrize("claimed", [10**9, 2**63, 2**64 - 1])
def test_header_larger_than_the_file(source: Path, claimed: int) -> None:
    path = first_shard(source)
    data = path.read_bytes()
    path.write_bytes(claimed.to_bytes(8, "little") + data[8:])
    refused(source, SourceError, f"{path.name}.*claims {claimed} bytes")


def _overlap(header: dict[str, Any]) -> None:
    _, b = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])[-2:]
    begin, end = header[b]["data_offsets"]
    header[b]["data_offsets"] = [begin - 2, end - 2]


def _entry(**fields: Any) -> Any:
    def change(header: dict[str, Any]) -> None:
        name = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
        header[name].update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_overlap, "overlaps the tensor before it"),
        (_entry(data_offsets=[10**9, 10**9 + 2]), "do not fit"),
        (_entry(data_offsets=[-2, 0]), "do not fit"),
        (_entry(data_offsets=[5, 3]), "do not fit"),
        (_entry(dtype="F128"), "unknown dtype 'F128'"),
        (_entry(shape=[-1, 2]), "not a list of sizes"),
        (_entry(shape=[True, 2]), "not a list of sizes"),
        (_entry(shape=[10**30]), "do not fit"),
        (_entry(shape=None), "needs dtype, shape and data_offsets"),
    ],
)
def test_headers_that_make_no_sense(source: Path, change: Any, message: str) -> None:
    edit_header(first_shard(source), change)
    refused(source, SourceError, message)


def test_header_that_names_a_tensor_twice(source: Path) -> None:
    path = first_shard(source)
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(source, SourceError, "names 'a' twice")


def test_duplicate_tensor_in_two_shards(source: Path) -> None:
    first, second = (load_file(source / f"model-0000{i}-of-00002.safetensors") for i in (1, 2))
    name = next(iter(first))
    save_file({**second, name: first[name]}, source / "model-00002-of-00002.safetensors")
    refused(source, SourceError, f"{name} is in both model-00001-of-00002.safetensors and model-00002")


# index


def edit_index(source: Path, change: Any) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(source: Path) -> None:
    first_shard(source).unlink()
    refused(source, SourceError, r"model-00001-of-00002\.safetensors: named by .* but missing")


def test_stale_index_that_lists_too_much(source: Path) -> None:
    edit_index(source, lambda m: m.update({"model.gone.weight": "model-00001-of-00002.safetensors"}))
    refused(source, SourceError, r"stale: model\.gone\.weight is not in")


def test_stale_index_that_lists_too_little(source: Path) -> None:
    edit_index(source, lambda m: m.pop(Q))
    refused(source, SourceError, f"stale: .*{Q}, which the index does not list")


def test_stale_index_beside_a_single_file(source: Path) -> None:
    save_file({k: v for p in source.glob("model-*") for k, v in load_file(p).items()}, source / "model.safetensors")
    for path in source.glob("model-*"):
        path.unlink()
    refused(source, SourceError, "delete the stale index")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../b.safetensors", "..\\x.safetensors"]
)
def test_index_that_leaves_the_folder(source: Path, name: str) -> None:
    edit_index(source, lambda m: m.update({Q: name}))
    refused(source, SourceError, "may not leave the folder")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "no json"])
def test_index_that_is_none(source: Path, content: str) -> None:
    (source / "model.safetensors.index.json").write_text(content)
    refused(source, SourceError, r"model\.safetensors\.index\.json")


# what the weights are


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, SourceError, r"pytorch_model\.bin.*never opened")


def test_pickles_beside_safetensors_are_left_behind(source: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(b"anything")
    checkpoint = quantize(source, source.parent / "out")
    assert not (checkpoint.path / "pytorch_model.bin").exists()
    assert (checkpoint.path / "extra" / "LICENSE").read_text() == "as you like"


def test_safetensors_that_the_index_does_not_name_are_left_behind_aloud(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"other": torch.ones(1)}, source / "adapter.safetensors")
    checkpoint = quantize(source, source.parent / "out")
    assert "left behind: adapter.safetensors" in caplog.text
    assert not (checkpoint.path / "adapter.safetensors").exists()


W = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("method", "config", "extra"),
    [
        ("fp8", {"quantization_config": {"quant_method": "fp8"}}, {}),
        ("gptq", {"quantization_config": {"quant_method": "gptq"}}, {}),
        ("awq", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, {}),
        ("bitsandbytes", {"quantization_config": {"quant_method": "bitsandbytes"}}, {}),
        ("mxfp4", {"quantization_config": {"quant_method": "mxfp4"}}, {}),
        ("kappaquant", {"quantization_config": {"quant_method": "kappaquant"}}, {}),
        ("FP8", {}, {f"{W}.weight_scale_inv": torch.ones(1, 1)}),
        ("FP8", {}, {f"{W}.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}),
        ("GPTQ or AWQ", {}, {f"{W}.qweight": torch.ones(2, 2, dtype=torch.int32)}),
        ("bitsandbytes", {}, {f"{W}.weight.absmax": torch.ones(2)}),
        ("MXFP4", {}, {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(2, dtype=torch.uint8)}),
        ("TurboQuant", {}, {f"{W}.weight.tq_packed": torch.ones(2, dtype=torch.uint8)}),
        ("compressed-tensors", {}, {f"{W}.weight_packed": torch.ones(2, dtype=torch.int32)}),
    ],
)
def test_already_quantized(method: str, config: dict[str, Any], extra: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", {**tensors(), **extra}, config={**CONFIG, **config})
    refused(folder, AlreadyQuantizedError, f"already quantized by {method}")


@pytest.mark.parametrize("name", [Q, EXPERTS, "model.norm.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight(name: str, bad: float, tmp_path: Path) -> None:
    content = tensors()
    content[name].view(-1)[-3] = bad
    folder = write_source(tmp_path / "source", content, shards=2)
    with pytest.raises(NonFiniteError, match=rf"{name}: holds NaN or infinity.*--allow-nonfinite"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint = quantize(folder, tmp_path / "out", allow_nonfinite=True)
    assert checkpoint.bits(name) == 16
    kept = checkpoint.tensor(name)
    assert torch.equal(kept.view(torch.int16), content[name].view(torch.int16))
    others = quantize(write_source(tmp_path / "clean", tensors(), shards=2), tmp_path / "clean_out")
    for other in others.keys():
        if other != name and others.format_of(other):
            assert torch.equal(checkpoint.packed(other), others.packed(other)), other
    assert list(checkpoint.verify()) == []
    assert not (tmp_path / "out.partial").exists()


def test_weights_beyond_the_norms_of_float16(tmp_path: Path) -> None:
    content = tensors()
    content[Q] *= 1e7
    folder = write_source(tmp_path / "source", content)
    with pytest.raises(NonFiniteError, match=rf"{Q}: .*65504.*16 bits"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert quantize(folder, tmp_path / "out", allow_nonfinite=True).bits(Q) == 16


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


# plans and outputs


@pytest.mark.parametrize("group", [0, 3, 16, 96, 100, 512, -128])
def test_group_that_is_no_power_of_two(source: Path, group: int) -> None:
    opened = kappaquant.open_source(source)
    with pytest.raises(PlanError, match=rf"group size {group}.*32, 64, 128, 256"):
        kappaquant.make_plan(opened.tensors, opened.config, group_size=group)


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, -3])
def test_bits_outside_2_to_8(source: Path, bits: int) -> None:
    opened = kappaquant.open_source(source)
    with pytest.raises(PlanError, match=rf"bits = {bits}"):
        kappaquant.make_plan(opened.tensors, opened.config, bits=bits)


@pytest.mark.parametrize(
    ("name", "message"), [("model.none.weight", "names 1 tensor the source does not have"), (Q, "leaves out 1 tensor")]
)
def test_plan_of_another_model(source: Path, name: str, message: str) -> None:
    opened = kappaquant.open_source(source)
    choices = dict(kappaquant.make_plan(opened.tensors, opened.config).choices)
    if name == Q:
        del choices[Q]
    else:
        choices[name] = Choice(3, "by hand")
    with pytest.raises(PlanError, match=f"{name}: the plan {message}"):
        kappaquant.quantize(opened, source.parent / "out", Plan(choices, 128, "by hand", {}))
    assert sorted(os.listdir(source.parent)) == ["source"]


def test_output_that_is_not_empty(source: Path) -> None:
    output = source.parent / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="out: exists and is not empty"):
        quantize(source, output)
    assert (output / "mine.txt").read_text() == "precious"
    assert sorted(os.listdir(source.parent)) == ["out", "source"]


def test_output_that_is_an_empty_folder(source: Path) -> None:
    (source.parent / "out").mkdir()
    assert quantize(source, source.parent / "out").bits(Q) == 3


@pytest.mark.parametrize("output", ["source", "source/out", "source/../source", "link"])
def test_output_in_the_source(source: Path, output: str) -> None:
    (source.parent / "link").symlink_to(source)
    before = sorted(os.listdir(source))
    with pytest.raises(OutputError, match="source folder"):
        quantize(source, source.parent / output)
    assert sorted(os.listdir(source)) == before


def test_output_below_a_folder_that_is_not_there(source: Path) -> None:
    with pytest.raises(OutputError, match=r"none: no such folder"):
        quantize(source, source.parent / "none" / "out")


def test_full_disk_shows_before_anything_is_encoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal, "allocate", full)
    refused(source, OutputError, "No space left on device; free space and run again")


def test_full_disk_in_the_middle_loses_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def full(descriptor: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    output = source.parent / "out"
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full; free space and run again to resume"):
        quantize(source, output)
    assert not output.exists()
    monkeypatch.undo()
    resumed = quantize(source, output)
    expected = quantize(source, source.parent / "expected")
    for path in expected.path.rglob("*"):
        if path.is_file():
            assert (resumed.path / path.relative_to(expected.path)).read_bytes() == path.read_bytes()


# our own checkpoints


@pytest.fixture
def checkpoint(source: Path) -> Path:
    return quantize(source, source.parent / "out").path


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of the shard that holds Q."""
    shard = kappaquant.open_checkpoint(folder).entry(Q).parts[0][0]
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
