"""Every kind of bad source: one typed error that names the file or tensor, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, Q, quantize, refused, tensors, write_source
from safetensors.torch import load_file, save_file

from kappaquant import AlreadyQuantizedError, SourceError, open_source


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


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_named_as_one(config: bool, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "adapter")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(
        SourceError, match=r"adapter: holds an adapter \(adapter_config.json\), which is no model; merge it"
    ):
        open_source(folder)


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
        ("quanto", {"quantization_config": {"quant_method": "quanto"}}, {}),
        ("int8", {"quantization_config": "int8"}, {}),
        ("gptq", {"quantization_config": {"quant_method": "gptq"}}, {}),
        ("awq", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, {}),
        ("bitsandbytes", {"quantization_config": {"quant_method": "bitsandbytes"}}, {}),
        (
            "compressed-tensors as pack-quantized",
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            {},
        ),
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
