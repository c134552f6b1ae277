"""A new format, int8 with one scale a row, from this file alone: every step and engine runs it, slowly, without another change.

As a program, this file runs vLLM's engine with the format registered (see ``vllm_engine``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import FormatError, NonFiniteError, PlanError, RegistrationError
from kappaquant.formats.base import Effort, Encoded, Format, Part
from kappaquant.formats.registry import register, unregister
from kappaquant.runtime.packed import PackedWeight


class RowInt8(Format):
    """w = scale of its row * int8."""

    id = "int8row"
    bits = 8

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {".row_int8": ("I8", shape), ".row_scale": ("F32", (*shape[:-1], 1))}

    def encode(self, weight: torch.Tensor, effort: Effort = "best", *, name: str = "weight") -> Encoded:
        w = weight.float()
        if not bool(w.isfinite().all()):
            raise NonFiniteError(f"{name}: holds NaN or infinity; keep it at 16 bits")
        scale = w.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(scale > 0, w / scale, 0).round().to(torch.int8)
        error = (codes * scale - w).double().square().sum().item()
        return Encoded({".row_int8": codes, ".row_scale": scale}, error, w.double().square().sum().item())

    def decode(self, parts: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return parts[".row_int8"].float() * parts[".row_scale"]

    def columns(self, start: int, stop: int) -> dict[str, slice]:
        return {".row_int8": slice(start, stop), ".row_scale": slice(0, 1)}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(RowInt8())
    yield
    unregister(RowInt8.id)


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path_factory.mktemp("format") / "source", experts="fused")
    tiny_models.character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Path:
    """Everything that can be in the new format is, but for what this leaves to a codebook format and in 16 bits."""
    settings = ("--set", "*_proj*=int8row", "--set", "*k_proj.weight=4", "--set", "*v_proj.weight=16")
    command("plan", source, "-o", tmp_path / "plan.json", "--policy", "uniform", *settings)
    command("quantize", source, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    return tmp_path / "out"


def test_every_step_takes_it(source: Path, quantized: Path, tmp_path: Path) -> None:
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {entry["format"] for entry in plan["tensors"].values()} > {"int8row", "kept"}
    assert json.loads((quantized / "kappaquant.json").read_text())["plan"] == plan  # nothing older can say it
    assert "all hashes match" in command("verify", quantized)
    shown = json.loads(command("inspect", quantized, "--json"))["tensors"]
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert (shown[experts]["format"], shown[experts]["bits"]) == ("int8row", 8)
    checkpoint = kappaquant.open_checkpoint(quantized)
    shape = checkpoint.shape(experts)
    assert checkpoint.nbytes(experts) == RowInt8().nbytes(shape) == shape[0] * shape[1] * (shape[2] + 4)
    command("dequantize", quantized, "-o", tmp_path / "plain", "--dtype", "F32")
    plain = kappaquant.open_source(tmp_path / "plain")
    for name in checkpoint.keys():
        assert torch.equal(plain.read(name).view(plain.tensors[name].shape).float(), checkpoint.dequantize(name))
    original = kappaquant.open_source(source)
    weight = original.read(experts).view(shape).float()
    assert float((checkpoint.dequantize(experts) - weight).norm() / weight.norm()) < 0.02


def test_a_model_computes_with_it(quantized: Path, tmp_path: Path) -> None:
    command("dequantize", quantized, "-o", tmp_path / "plain", "--dtype", "F32")
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    model, _ = kappaquant.load(quantized, dtype=torch.float32, activations="float32")
    held = {m.fmt.id: m.kernel.name for m in model.modules() if isinstance(m, PackedWeight)}
    assert held["int8row"] == "any format"
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() < 1e-4
    assert command("generate", quantized, "ab", "--max-new-tokens", 4)


def test_it_resumes_and_takes_workers(source: Path, quantized: Path, tmp_path: Path) -> None:
    opened, plan = kappaquant.open_source(source), kappaquant.Plan.load(tmp_path / "plan.json")
    again = kappaquant.quantize(opened, tmp_path / "again", plan, kappaquant.Options(jobs=1))
    for path in quantized.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize(("format_id", "bits"), [("kept", 8), ("BF16", 8), ("4", 4), ("", 4), (None, 4), ("wide", 16), ("none", 0)])  # fmt: skip
def test_ids_that_mean_something_else_and_bits_out_of_range_are_refused(format_id: str, bits: int) -> None:
    other = type("Other", (RowInt8,), {"id": format_id, "bits": bits})()
    with pytest.raises(RegistrationError, match=r"must be a word that begins|a code has 1 to 15"):
        register(other)


def test_what_does_not_know_it_says_so(source: Path, quantized: Path, tmp_path: Path) -> None:
    opened, plan = kappaquant.open_source(source), kappaquant.Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"int8row is no format of tq3_native; write the kappaquant container"):
        kappaquant.quantize(opened, tmp_path / "native", plan, kappaquant.Options(container="tq3_native"))
    with pytest.raises(RegistrationError, match="format id 'int8row' is taken by"):
        register(Renamed())
    unregister(RowInt8.id)
    with pytest.raises(FormatError, match=r"unknown format id 'int8row'; this version reads tq2g32"):
        kappaquant.open_checkpoint(quantized)
    with pytest.raises(PlanError, match="unknown format id 'int8row'"):
        kappaquant.Plan.load(tmp_path / "plan.json")
    register(RowInt8())


class Renamed(RowInt8):
    key = "int8row+other"


def test_vllm_serves_it(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    import vllm_checkpoints
    import vllm_engine

    source = vllm_checkpoints.save_source("qwen3_moe", tmp_path / "source")
    overrides = (("*_proj.weight", "int8row"), ("*.k_proj.weight", 4))
    folder = vllm_checkpoints.quantize(source, tmp_path / "out", "apex2", overrides)
    prompts = [[5, 6, 7, 8, 9], list(range(3, 40))]
    spec, out = tmp_path / "spec.json", tmp_path / "out.pt"
    runs = [
        {"model": str(folder), "dtype": "float32", "enforce_eager": True},
        {"model": str(folder), "dtype": "float32"},
    ]
    spec.write_text(json.dumps({"prompts": prompts, "runs": runs, "sampling": vllm_engine.WHOLE}))
    done = subprocess.run(
        [sys.executable, __file__, str(spec), str(out)], capture_output=True, text=True, timeout=900,
        env=vllm_engine.environment(PYTHONPATH=":".join(sys.path)),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for result in torch.load(out):
        expected = vllm_checkpoints.reference(folder, result["tokens"])
        found = torch.cat(result["logprobs"])
        assert (found - expected).abs().max() < 2e-3


if __name__ == "__main__":
    import vllm_engine

    register(RowInt8())
    vllm_engine.main(*sys.argv[1:])
