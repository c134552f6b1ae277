"""Every encoding: any elements of any shape are those of the whole, whatever they begin or end in the middle of."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoded_sources import KINDS, MXFP4_EXPERTS, Kind, Stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import kappaquant
from kappaquant.files import tensors as file_tensors
from kappaquant.sources.encodings.base import EncodedEntry
from kappaquant.sources.encodings.recognize import ENCODINGS
from kappaquant.sources.source import Source

NAME = "model.layers.0.mlp.down_proj.weight"
ALL = {**KINDS, "mxfp4 experts": MXFP4_EXPERTS}


def opened(folder: Path, kind: Kind, shape: tuple[int, ...], seed: int = 0) -> tuple[Source, Stored]:
    stored = kind.store(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    folder.mkdir(exist_ok=True)
    parts = {NAME + suffix: part.contiguous() for suffix, part in stored.parts.items()}
    save_file(parts, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": kind.config}))
    return kappaquant.open_source(folder), stored


def test_every_encoding_is_tried_here(tmp_path: Path) -> None:
    seen = {
        type(found.encoding)
        for name, kind in ALL.items()
        for found in opened(tmp_path / name, kind, (2, 64, 64))[0].encoded.values()
    }
    assert seen == set(ENCODINGS)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_elements_are_those_of_the_whole(name: str, data: st.DataObject, tmp_path: Path) -> None:
    fp8, experts = "fp8" in name, name == "mxfp4 experts"
    wide = data.draw(st.integers(1, 300)) if fp8 else 32 * data.draw(st.integers(1, 8))
    tall = data.draw(st.integers(1, 300))
    stack = (data.draw(st.integers(1, 3)),) if experts or data.draw(st.booleans()) else ()
    shape = (*stack, wide, tall) if experts else (*stack, tall, wide)
    source, stored = opened(tmp_path, ALL[name], shape)
    assert source.tensors[NAME].shape == shape
    assert source.tensors[NAME].dtype == "BF16"
    whole = stored.values.bfloat16().flatten()
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    for begin, end in ((start, stop), (0, whole.numel())):
        found = source.read(NAME, begin, end)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.view(torch.int16), whole[begin:end].view(torch.int16))


@pytest.mark.parametrize("name", ALL)
def test_a_slice_reads_its_own_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of a matrix take some of the file; stacked and transposed, those of one expert, and not all at once."""
    source, _ = opened(tmp_path, ALL[name], (8, 256, 256))
    read: list[int] = []
    real = file_tensors.read_bytes

    def counted(path: Path, offset: int, size: int) -> bytearray:
        read.append(size)
        return real(path, offset, size)

    monkeypatch.setattr(file_tensors, "read_bytes", counted)
    source.read(NAME, 5 * 256 * 256 + 40 * 256, 5 * 256 * 256 + 48 * 256)
    if name == "mxfp4 experts":
        assert sum(read) <= source.stored_bytes / 8
        monkeypatch.setattr("kappaquant.sources.encodings.mxfp4_experts._AT_ONCE", 4096)
        read.clear()
        source.read(NAME, 5 * 256 * 256 + 40 * 256, 5 * 256 * 256 + 48 * 256)
        assert max(read) <= 4096
    else:
        assert sum(read) <= source.stored_bytes / 64


def test_an_entry_travels(tmp_path: Path) -> None:
    source, stored = opened(tmp_path, KINDS["nvfp4"], (8, 64))
    entry = pickle.loads(pickle.dumps(source.entry(NAME)))
    assert isinstance(entry, EncodedEntry)
    assert entry.nbytes == source.stored_bytes
    assert torch.equal(entry.read(), stored.values.bfloat16())
    assert torch.equal(entry.read_rows(2, 4), stored.values.bfloat16()[2:4].float())


def check(kind: Kind, shape: tuple[int, ...], theirs: Callable[[Stored], torch.Tensor], folder: Path) -> None:
    """Another package makes the same of what is stored."""
    source, stored = opened(folder, kind, shape)
    found, expected = source.read(NAME).view(source.tensors[NAME].shape), theirs(stored)
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_fp8_as_transformers_decodes_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def theirs(stored: Stored) -> torch.Tensor:
        return Fp8Dequantize(None)._dequantize_one(stored.parts[""], stored.parts["_scale_inv"], torch.bfloat16)

    check(KINDS["fp8 blocks"], (256, 384), theirs, tmp_path)


def test_mxfp4_experts_as_transformers_decodes_them(tmp_path: Path) -> None:
    """Transposed: the model multiplies by [in, out] from the right."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def theirs(stored: Stored) -> torch.Tensor:
        return convert_moe_packed_tensors(stored.parts["_blocks"], stored.parts["_scales"])

    check(MXFP4_EXPERTS, (3, 64, 70), theirs, tmp_path)


def test_every_exponent(tmp_path: Path) -> None:
    """2 ** (byte - 127), the smallest below float32's normal numbers; 255 is none."""
    codes = torch.full((255, 16), 0x22, dtype=torch.uint8)  # all 1.0
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    config = {"model_type": "llama", "quantization_config": KINDS["compressed mxfp4"].config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = {NAME + "_packed": codes, NAME + "_scale": scales}
    save_file(parts, tmp_path / "model.safetensors")
    found = kappaquant.open_source(tmp_path).read(NAME).view(255, 32)
    assert torch.equal(found[:, 0].double(), torch.arange(-127, 128).double().exp2())
    scales[7] = 255
    save_file(parts, tmp_path / "model.safetensors")
    source = kappaquant.open_source(tmp_path)
    assert source.read(NAME, 0, 7 * 32).isfinite().all()
    with pytest.raises(kappaquant.SourceError, match=f"{NAME}_scale: a scale in model.safetensors is NaN"):
        source.read(NAME, 0, 7 * 32 + 1)
