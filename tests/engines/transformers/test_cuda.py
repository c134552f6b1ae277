"""What runs on a GPU gives what the CPU gives; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import kappaquant
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.runtime.packed import PackedWeight
from kappaquant.sources.folder import LocalSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("bits", BITS)
def test_encode_gives_the_same_bytes(bits: int, effort: Effort) -> None:
    weight = torch.randn(3, 40, 300, generator=torch.Generator().manual_seed(bits)).bfloat16()
    fmt = CodebookFormat(bits, 128)
    cpu, gpu = codec.encode(weight, fmt, effort), codec.encode(weight.cuda(), fmt, effort)
    assert torch.equal(cpu.packed, gpu.packed.cpu())
    assert torch.equal(cpu.norms, gpu.norms.cpu())
    assert gpu.squared_error == pytest.approx(cpu.squared_error, rel=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_decode_gives_the_same_floats(group_size: int) -> None:
    weight = torch.randn(17, 515)
    fmt = CodebookFormat(3, group_size)
    encoded = codec.encode(weight, fmt, "fast")
    expected = codec.decode(encoded.packed, encoded.norms, fmt, 515)
    assert torch.equal(codec.decode(encoded.packed.cuda(), encoded.norms.cuda(), fmt, 515).cpu(), expected)


def test_quantize_and_scan_write_what_the_cpu_writes(tmp_path: Path) -> None:
    source = kappaquant.open_source(save_tiny("qwen3_5_moe_text", tmp_path / "source", dtype=torch.bfloat16))
    assert isinstance(source, LocalSource)
    plan = kappaquant.make_plan(source.tensors, source.config, "recipe")
    for device in ("cpu", "cuda"):
        kappaquant.quantize(source, tmp_path / device, plan, kappaquant.Options(device=device))
    for path in (tmp_path / "cpu").iterdir():
        assert path.read_bytes() == (tmp_path / "cuda" / path.name).read_bytes(), path.name
    cpu, gpu = (kappaquant.scan(source, device=d).tensors for d in ("cpu", "cuda"))
    for name, stats in cpu.items():
        assert gpu[name].kurtosis == pytest.approx(stats.kurtosis, rel=1e-9)
        assert gpu[name].relative_mse == pytest.approx(stats.relative_mse, rel=1e-6)


@pytest.mark.parametrize(("activations", "most"), [("bf16", 4e-3), ("int8", 0.05)])
@pytest.mark.parametrize("architecture", ["qwen3_5_moe_text", "mixtral", "llama", "gemma3", "qwen3", "qwen3_moe"])
def test_loaded_model_gives_the_same_logits(architecture: str, activations: str, most: float, tmp_path: Path) -> None:
    source = kappaquant.open_source(save_tiny(architecture, tmp_path / "source"))
    plan = kappaquant.make_plan(source.tensors, source.config, "recipe")
    kappaquant.quantize(source, tmp_path / "out", plan)
    ids = torch.randint(3, 90, (2, 19), generator=torch.Generator().manual_seed(0))
    logits = []
    for device in ("cpu", "cuda"):
        model, _ = kappaquant.load(tmp_path / "out", dtype=torch.float32, device=device, activations=activations)
        with torch.no_grad():
            logits.append(model(input_ids=ids.to(device)).logits.cpu())
    assert any(isinstance(m, PackedWeight) and m.kernel.name == "tensor_cores" for m in model.modules())
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    error = (logits[0] - logits[1]).norm(dim=-1) / logits[0].norm(dim=-1)
    assert error.median() <= most  # of tokens: where two experts are near equal, the slightest change swaps them
    with torch.no_grad():
        again = model.cpu()(input_ids=ids).logits
    assert torch.equal(again, logits[0])


def test_a_loaded_model_takes_the_bytes_of_its_checkpoint(tmp_path: Path) -> None:
    source = kappaquant.open_source(save_tiny("qwen3_5_moe_text", tmp_path / "source", dtype=torch.bfloat16))
    kappaquant.quantize(source, tmp_path / "out", kappaquant.make_plan(source.tensors, source.config, "recipe"))
    model, _ = kappaquant.load(tmp_path / "out", device="cuda")
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    held = sum(b.nbytes for m in packed for b in m.buffers())
    stored = sum(m.fmt.nbytes(tuple(m.shape)) for m in packed)
    assert stored <= held <= 1.6 * stored  # tiny matrices are padded to whole tiles
