"""Sources that other tools stored quantized: the same to all that reads them as the bf16 that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, EXPERTS, Q, quantize, refused, tensors, write_source
from encoded_sources import KINDS, MXFP4_EXPERTS, Kind, encoded, fp8_blocks
from safetensors.torch import load_file, save_file
from torch import Tensor

import kappaquant
from kappaquant import AlreadyQuantizedError, SourceError
from kappaquant.errors import NonFiniteError
from kappaquant.planning.profile import scan

OUT = "model.layers.0.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.experts.down_proj"


def content() -> dict[str, Tensor]:
    """Weights whose rows and columns are no multiples of 128, whole and stacked; one that stays as it is, and an embedding."""
    found = {name: tensor for name, tensor in tensors().items() if tensor.numel() and tensor.dtype == torch.bfloat16}
    found[OUT] = found[OUT][:200, :160].contiguous()
    return found


def pair(folder: Path, kind: Kind, chosen: Callable[[str], bool], **others: Tensor) -> tuple[Path, Path]:
    """A source stored in a kind, and beside it the bf16 source with the same values."""
    stored, plain = encoded(content(), kind, chosen)
    config = {**CONFIG, "quantization_config": kind.config}
    shards = 4  # names are dealt out in turn: scales lie in other shards than their codes
    (folder / "stored").mkdir(parents=True)
    return (
        write_source(folder / "stored" / "model", {**stored, **others}, shards, config),
        write_source(folder / "plain" / "model", plain),
    )


def is_weight(name: str) -> bool:
    return "_proj" in name and name != "model.layers.0.self_attn.k_proj.weight"


ALL = [(name, kind, is_weight) for name, kind in KINDS.items()]
ALL.append(("mxfp4 experts", MXFP4_EXPERTS, lambda name: name in (EXPERTS, DOWN)))


@pytest.mark.parametrize(("kind", "chosen"), [each[1:] for each in ALL], ids=[each[0] for each in ALL])
def test_it_quantizes_to_the_bytes_of_its_bf16(
    kind: Kind, chosen: Callable[[str], bool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scale = {"model.layers.0.self_attn.q_proj.input_scale": torch.tensor(2.0)}
    stored, plain = pair(tmp_path, kind, chosen, **scale)
    source, other = kappaquant.open_source(stored), kappaquant.open_source(plain)
    assert source.tensors == other.tensors
    assert source.stored_as == kind.label
    assert other.stored_as is None
    assert "quantization_config" not in source.config
    assert source.identity() != other.identity()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"stored as {kind.label} are read as the bf16 they stand for; " in said[0]
    assert (
        "1 scales of activations or of cached keys and values (such as model.layers.0.self_attn.q_proj.input_scale)"
        in said[0]
    )

    made, expected = (quantize(folder, tmp_path / f"{folder.parent.name}_out") for folder in (stored, plain))
    assert {name: made.tensor(name).dtype for name in made.keys() if not made.format_of(name)} == {
        name: expected.tensor(name).dtype for name in expected.keys() if not expected.format_of(name)
    }
    for name in expected.keys():
        for (_, ours), (_, theirs) in zip(
            made.entry(name).parts.values(), expected.entry(name).parts.values(), strict=True
        ):
            assert ours.info == theirs.info
    manifest, without = (json.loads((c.path / "kappaquant.json").read_text()) for c in (made, expected))
    assert manifest.pop("source") == {"model": "model", "revision": None, "stored_as": kind.label}
    assert without.pop("source") == {"model": "model", "revision": None}
    assert manifest == without  # it holds the hash of every tensor
    config = json.loads((made.path / "config.json").read_text())
    assert config == json.loads((expected.path / "config.json").read_text())


def test_a_profile_of_it_is_that_of_its_bf16(tmp_path: Path) -> None:
    stored, plain = (kappaquant.open_source(folder) for folder in pair(tmp_path, KINDS["fp8 blocks"], is_weight))
    assert scan(stored, bits=[3], jobs=1).tensors == scan(plain, bits=[3], jobs=1).tensors


def test_what_modelopt_says_in_a_file_of_its_own(tmp_path: Path) -> None:
    stored, _ = pair(tmp_path, KINDS["nvfp4"], is_weight)
    (stored / "config.json").write_text(json.dumps(CONFIG))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (stored / "hf_quant_config.json").write_text(json.dumps(said))
    made = quantize(stored, tmp_path / "out")
    assert not (made.path / "hf_quant_config.json").exists()
    assert json.loads((made.path / "kappaquant.json").read_text())["source"]["stored_as"] == "nvfp4"


def test_a_cache_alone_may_be_quantized(tmp_path: Path) -> None:
    others = {"model.layers.0.self_attn.k_scale": torch.tensor(0.5)}
    config = {**CONFIG, "quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}}
    source = kappaquant.open_source(write_source(tmp_path / "source", {**content(), **others}, config=config))
    assert source.stored_as is None
    assert source.tensors.keys() == content().keys()


def test_one_file_with_several_kinds(tmp_path: Path) -> None:
    """As compressed-tensors' mixed-precision has them."""
    stored, plain = encoded(content(), KINDS["compressed nvfp4"], lambda name: name == Q)
    stored, plain = {**stored, OUT: plain[OUT]}, plain
    more, values = encoded({OUT: content()[OUT]}, KINDS["compressed fp8 channels"], lambda name: True)
    del stored[OUT]
    config = {**KINDS["compressed nvfp4"].config, "format": "mixed-precision"}
    folder = write_source(tmp_path / "s", {**stored, **more}, config={**CONFIG, "quantization_config": config})
    source = kappaquant.open_source(folder)
    assert source.stored_as == "fp8, per channel; nvfp4"
    assert torch.equal(source.read(OUT).view(values[OUT].shape), values[OUT])
    assert torch.equal(source.read(Q).view(plain[Q].shape), plain[Q])


# what is refused

BLOCKS = KINDS["fp8 blocks"]


def write(folder: Path, change: Callable[[dict[str, Tensor]], Any], kind: Kind = BLOCKS) -> Path:
    stored, _ = encoded(content(), kind, lambda name: name == Q)
    change(stored)
    return write_source(folder / "source", stored, config={**CONFIG, "quantization_config": kind.config})


def put(suffix: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.update({Q + suffix: value})


def take(suffix: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.pop(Q + suffix)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8 blocks", take("_scale_inv"), rf"{Q}: is stored as F8_E4M3 and has no scale \({Q}_scale_inv or {Q}_scale\)"),
        ("fp8 blocks", put("_scale_inv", torch.ones(2, 2)), rf"{Q}_scale_inv: has shape \[2, 2\].*\[1, 2\] .blocks of 128x128"),
        ("fp8 blocks", put("_scale_inv", torch.ones(96, 2)), rf"{Q}_scale_inv: has shape \[96, 2\].*\[96, 1\] .per channel"),
        ("fp8 blocks", put("_scale", torch.ones(1)), f"{Q}: .* has both {Q}_scale_inv and {Q}_scale"),
        ("fp8 blocks", put("_scale_inv", torch.ones(1, 2, dtype=torch.int32)), f"{Q}_scale_inv: a scale of dtype I32"),
        ("fp8 blocks", put("", content()[Q]), f"{Q}_scale_inv is left over: {Q} is BF16, not quantized"),
        ("fp8 blocks", take(""), f"{Q}_scale_inv is left over: there are no weights"),
        ("nvfp4", take("_scale"), f"{Q}: is stored as U8 and has no scale"),
        ("nvfp4", take("_scale_2"), f"{Q}: is stored as U8 and has no scale .{Q}_scale_2"),
        ("nvfp4", put("_scale_2", torch.ones(96)), rf"{Q}_scale_2: has shape \[96\].*one number"),
        ("nvfp4", put("_scale", torch.ones(96, 16)), f"{Q}: is packed into bytes, with a scale of dtype F32"),
        ("nvfp4", put("_scale", torch.ones(96, 8).to(torch.float8_e4m3fn)), rf"{Q}_scale: has shape \[96, 8\].*\[96, 16\]"),
        ("compressed nvfp4", put("", content()[Q]), f"{Q} is stored twice, as it is and as {Q}_packed"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(kind: str, change: Any, message: str, tmp_path: Path) -> None:
    refused(write(tmp_path, change, KINDS[kind]), SourceError, message)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["_scale", "_scale_2"])
def test_a_scale_that_is_no_number(suffix: str, bad: float, tmp_path: Path) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        scale = stored[Q + suffix].float().reshape(-1)
        scale[-1] = bad if suffix == "_scale_2" else float("nan")  # E4M3 has no infinity
        stored[Q + suffix] = scale.to(stored[Q + suffix].dtype).view(stored[Q + suffix].shape)

    folder = write(tmp_path, spoil, KINDS["nvfp4"])
    with pytest.raises(NonFiniteError, match=f"{Q}{suffix}: a scale in model.safetensors is NaN or infinite"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_that_are_no_number_are_those_of_the_weight(tmp_path: Path) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        stored[Q].view(torch.uint8)[3, 3] = 0x7F

    folder = write(tmp_path, spoil)
    with pytest.raises(NonFiniteError, match=f"{Q}: holds NaN or infinity"):
        quantize(folder, tmp_path / "out")
    assert quantize(folder, tmp_path / "out", allow_nonfinite=True).bits(Q) == 16


def test_a_config_that_promises_what_is_not_there(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", content(), config={**CONFIG, "quantization_config": BLOCKS.config})
    refused(folder, SourceError, "says that the weights are stored as fp8, but none is; if they are plain floats, take")


def test_fp8_that_no_config_speaks_of(tmp_path: Path) -> None:
    stored, _ = encoded(content(), BLOCKS, lambda name: name == Q)
    folder = write_source(tmp_path / "source", stored)
    refused(folder, AlreadyQuantizedError, f"already quantized by FP8.*tensor {Q}.*config.json says how it is stored")


def test_weights_of_awq_inside_modelopt(tmp_path: Path) -> None:
    name = Q.replace("weight", "pre_quant_scale")
    folder = write(tmp_path, lambda stored: stored.update({name: torch.ones(256)}), KINDS["nvfp4"])
    refused(folder, AlreadyQuantizedError, f"already quantized by ModelOpt .AWQ or SVD.: tensor {name}")


def test_a_shard_of_scales_alone(tmp_path: Path) -> None:
    """The shards of the output are those that hold weights."""
    folder = tmp_path / "source"
    stored, plain = encoded(content(), BLOCKS, is_weight)
    write_source(folder, stored, config={**CONFIG, "quantization_config": BLOCKS.config})
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {"a.safetensors": [n for n in whole if n.endswith("_scale_inv")]}
    files["b.safetensors"] = [n for n in whole if not n.endswith("_scale_inv")]
    for file, names in files.items():
        save_file({name: whole[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = quantize(folder, tmp_path / "out")
    assert [path.name for path in made.path.glob("*.safetensors")] == ["b.safetensors"]
    assert set(made.keys()) == set(plain)
    assert list(made.verify()) == []


def test_blocks_of_other_sizes_are_told_apart_by_their_grid(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    kind = Kind(fp8_blocks(64, 32), config, "")
    stored, plain = encoded(content(), kind, lambda name: name == Q)
    folder = write_source(tmp_path / "s", stored, config={**CONFIG, "text_config": {"quantization_config": config}})
    source = kappaquant.open_source(folder)
    assert source.stored_as == "fp8, blocks of 64x32"
    assert torch.equal(source.read(Q).view(96, 256), plain[Q])
    assert source.config["text_config"] == {}
