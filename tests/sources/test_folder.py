"""Opening a source: headers only, slices as stored, and plain words for what cannot be opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from builders import CONFIG, EXPERTS, Q, tensors, write_source
from safetensors.torch import save_file

import kappaquant
from kappaquant import SourceError
from kappaquant.files import safetensors as safetensors_io
from kappaquant.files import tensors as elements
from kappaquant.sources import source


def test_every_slice_is_what_is_stored(tmp_path: Path) -> None:
    opened, content = kappaquant.open_source(write_source(tmp_path / "source", shards=3)), tensors()
    assert len(opened.shards) == 3
    for name, tensor in content.items():
        assert opened.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(opened.read(name), tensor.reshape(-1))
    assert torch.equal(opened.read(EXPERTS, 1000, 3333), content[EXPERTS].reshape(-1)[1000:3333])
    assert opened.side_files == ["extra/LICENSE", "tokenizer.json"]
    assert (opened.label, opened.revision) == (str(tmp_path / "source"), None)


def test_headers_come_first_and_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(tmp_path / "source", shards=2)
    monkeypatch.setattr(elements, "read_bytes", lambda *a: pytest.fail("a weight was read"))
    opened = kappaquant.open_source(folder)
    assert kappaquant.make_plan(opened.tensors, opened.config).bits(Q) == 3


def test_every_dtype_survives(tmp_path: Path) -> None:
    content = {
        f"model.x{i}": torch.arange(6).to(dtype)
        for i, dtype in enumerate(
            (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
             torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
        )
    }  # fmt: skip
    opened = kappaquant.open_source(write_source(tmp_path / "source", content))
    for name, tensor in content.items():
        assert opened.read(name).dtype == tensor.dtype
        assert torch.equal(opened.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_a_single_shard_may_have_any_name(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    opened = kappaquant.open_source(folder)
    assert list(opened.shards) == ["weights.safetensors"]
    (folder / "more.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    with pytest.raises(SourceError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        kappaquant.open_source(folder)


def test_hidden_files_and_other_weights_stay_behind(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    for name in (".cache/x", ".gitattributes", "model.gguf", "tf_model.h5", "flax_model.msgpack", "extra/old.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert kappaquant.open_source(folder).side_files == ["extra/LICENSE", "tokenizer.json"]


def test_a_header_that_changes_under_way(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    opened = kappaquant.open_source(folder)
    save_file({Q: torch.zeros(3, 256)}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.safetensors: its header changed"):
        opened.read(Q)


def test_a_header_is_read_once_while_its_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of thousands of experts has a header of megabytes, which each of them would read again."""
    opened, read = kappaquant.open_source(write_source(tmp_path / "source")), []
    monkeypatch.setattr(source, "read_header", lambda path: read.append(path) or safetensors_io.read_header(path))
    for name in (*opened.tensors, *opened.tensors):
        opened.read(name)
    assert len(read) == 1
    save_file({Q: torch.zeros(3, 256)}, tmp_path / "source/model.safetensors")
    with pytest.raises(SourceError, match=r"model\.safetensors: its header changed"):
        opened.read(Q)
    (tmp_path / "source/model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot be read \(No such file or directory\)"):
        opened.read(Q)


def test_data_that_ends_under_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345678")
    assert safetensors_io.read_bytes(tmp_path / "x", 2, 3) == b"345"
    with pytest.raises(SourceError, match="x: ends at byte 8, 3 bytes early"):
        safetensors_io.read_bytes(tmp_path / "x", 5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a JSON list where an object belongs"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (f'{{"a": {"9" * 5000}}}', "not JSON"),
        ('{"text_config": [1]}', "'text_config' is"),
        ('{"model_type": 3}', "'model_type' is 3"),
        ('{"architectures": "LlamaForCausalLM"}', "'architectures' is"),
        ('{"architectures": [1]}', "not all names"),
    ],
)
def test_a_config_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match=f"config.json.*{message}"):
        kappaquant.open_source(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_folder_or_a_broken_link_where_a_file_belongs(name: str, tmp_path: Path) -> None:
    for kind in ("folder", "link"):
        folder = write_source(tmp_path / kind)
        (folder / name).unlink(missing_ok=True)
        if kind == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to(tmp_path / "nowhere")
        if name.endswith("index.json"):
            assert kappaquant.open_source(folder).tensors
        else:
            with pytest.raises(SourceError, match=name if name == "config.json" else "no safetensors files"):
                kappaquant.open_source(folder)


@pytest.mark.parametrize("name", ["bad\ud800name", "bad\nname", "bad\x1b[31mname"])
def test_names_that_no_terminal_or_file_should_see(name: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    text = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SourceError, match="control characters or broken Unicode"):
        kappaquant.open_source(folder)


@pytest.mark.parametrize(("begin", "message"), [(4, None), (6, r"b at bytes 6\.\.8 leaves a hole before it")])
def test_holes_between_tensors(begin: int, message: str | None, tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [begin, begin + 2]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(begin + 2))
    if message is None:
        assert safetensors_io.read_header(path)["b"].offset == 8 + len(text) + 4
    else:
        with pytest.raises(SourceError, match=message):
            safetensors_io.read_header(path)


def test_a_deep_header(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    text = b"[" * 200_000
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SourceError, match="not JSON"):
        kappaquant.open_source(folder)


@pytest.mark.parametrize("location", ["a/b--c", "-a/b", "a/b.git", "a/" + "b" * 100])
def test_ids_that_the_hub_does_not_allow(location: str) -> None:
    with pytest.raises(SourceError, match=f"{location}: no such folder here, and from the Hub"):
        kappaquant.open_source(location)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for stream in (True, False):
        with pytest.raises(SourceError, match="owner/name: no such folder here, and from the Hub"):
            kappaquant.open_source("owner/name", stream=stream)


def test_a_file_and_a_revision_of_a_folder(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    with pytest.raises(SourceError, match=r"model\.safetensors: is a file; give the folder"):
        kappaquant.open_source(folder / "model.safetensors")
    with pytest.raises(SourceError, match="--revision main applies to a Hub id"):
        kappaquant.open_source(folder, "main")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_that_may_not_be_read(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        kappaquant.open_source(folder)


def test_headers_we_build_are_those_the_package_reads(tmp_path: Path) -> None:
    infos = kappaquant.open_source(write_source(tmp_path / "source", config=CONFIG)).tensors
    header, stored = safetensors_io.build_header(infos.values())
    size = safetensors_io.file_size(stored, header)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(size - len(header)))
    assert safetensors_io.read_header(path) == stored
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(infos)
    assert all(s.offset % {"BF16": 2, "F16": 2, "F32": 4, "I64": 8}[s.info.dtype] == 0 for s in stored.values())
