"""Trellis formats through every step and engine that goes by formats; what cannot take them says so by their id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import FormatError, PlanError
from kappaquant.formats import registry
from kappaquant.kernels import dispatch
from kappaquant.kernels.cpu.library import absence
from kappaquant.runtime.packed import PackedWeight

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path_factory.mktemp("trellis") / "source", experts="fused")
    tiny_models.character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planned(source: Path) -> Path:
    """Trellis codes of two widths and groups, beside a codebook and tensors that are kept."""
    plan = source.parent / "plan.json"
    settings = ("*_proj*=t3g64", "*q_proj.weight=t4g32", "*k_proj.weight=t2g128", "*v_proj.weight=4")
    command("plan", source, "-o", plan, "--policy", "uniform", *(word for s in settings for word in ("--set", s)))
    return plan


@pytest.fixture(scope="module")
def quantized(source: Path, planned: Path) -> Path:
    command("quantize", source, "-o", source.parent / "out", "--plan", planned, "--jobs", 2)
    return source.parent / "out"


def test_it_is_written_verified_and_shown(source: Path, planned: Path, quantized: Path, tmp_path: Path) -> None:
    assert "all hashes match" in command("verify", quantized)
    shown = json.loads(command("inspect", quantized, "--json"))["tensors"]
    assert (shown[EXPERTS]["format"], shown[EXPERTS]["bits"]) == ("t3g64", 3)
    settings = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert [len(settings["codebooks"][fmt]) for fmt in ("t2g128", "t3g64", "t4g32")] == [8, 16, 32]
    command("quantize", source, "-o", tmp_path / "again", "--plan", planned, "--jobs", 1)
    for path in quantized.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_model_computes_with_it(quantized: Path, tmp_path: Path) -> None:
    command("dequantize", quantized, "-o", tmp_path / "plain", "--dtype", "F32")
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    model, _ = kappaquant.load(quantized, dtype=torch.float32, activations="float32", device="cpu")
    held = {m.fmt.id: m.kernel.name for m in model.modules() if isinstance(m, PackedWeight)}
    assert {held[fmt] for fmt in ("t2g128", "t3g64", "t4g32")} == {"any format" if absence() else "native"}
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() < 1e-4
    assert command("generate", quantized, "ab", "--max-new-tokens", 4, "--device", "cpu")


def test_it_loses_less_than_a_codebook_of_its_bits(source: Path, quantized: Path) -> None:
    opened, checkpoint = kappaquant.open_source(source), kappaquant.open_checkpoint(quantized)
    weight = opened.read(EXPERTS).view(checkpoint.shape(EXPERTS)).float()
    scalar = registry.format_by_id("tq3g64", EXPERTS).encode(weight).relative_mse
    assert json.loads((quantized / "kappaquant.json").read_text())["tensors"][EXPERTS]["relative_mse"] < 0.75 * scalar


def test_it_is_calibrated(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab cd ef gh " * 40)
    manifests = []
    for name, more in (("free", ()), ("calibrated", ("--calibration", text))):
        command("quantize", source, "-o", tmp_path / name, "--policy", "uniform", "--bits", 4, "--set", "*o_proj.weight=t2g64",
                "--jobs", 1, "--device", "cpu", *more)  # fmt: skip
        assert "all hashes match" in command("verify", tmp_path / name)
        manifests.append(json.loads((tmp_path / name / "kappaquant.json").read_text()))
    weight = "model.layers.0.self_attn.o_proj.weight"
    free, calibrated = (manifest["tensors"][weight]["relative_mse"] for manifest in manifests)
    assert free < calibrated < 1  # for its inputs, not for itself
    assert manifests[1]["effort"] == "calibrated"


def test_a_version_without_it_refuses_it_by_its_id(
    quantized: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {fmt.id: fmt for fmt in registry.formats() if fmt.id.startswith("tq")}
    monkeypatch.setattr(registry, "_FORMATS", known)
    with pytest.raises(FormatError, match=r"model\.layers\..*: unknown format id 't\dg\d+'; this version reads tq2g32"):
        kappaquant.open_checkpoint(quantized)
    with pytest.raises(PlanError, match=r"unknown format id 't\dg\d+'"):
        kappaquant.Plan.load(planned)


def test_published_loaders_do_not_get_it(source: Path, planned: Path, tmp_path: Path) -> None:
    opened, plan = kappaquant.open_source(source), kappaquant.Plan.load(planned)
    with pytest.raises(PlanError, match=r"t\dg\d+ is no format of tq3_native; plan with --formats k, or write the"):
        kappaquant.quantize(opened, tmp_path / "native", plan, kappaquant.Options(container="tq3_native"))
    assert not (tmp_path / "native").exists()


def test_exports_have_its_decoded_weights(quantized: Path, tmp_path: Path) -> None:
    """Stock mlx_lm gets affine codes of the same bits, or the very weights."""
    command("export", quantized, "-o", tmp_path / "affine")
    report = json.loads((tmp_path / "affine" / "mlx_export.json").read_text())
    assert report["notes"][0].startswith("quantized twice: the source is a kappaquant checkpoint")
    layer = "model.layers.0.self_attn."
    assert [report["tensors"][f"{layer}{part}_proj.weight"]["bits"] for part in "qkvo"] == [4, 2, 4, 3]
    assert report["tensors"]["model.layers.0.mlp.switch_mlp.up_proj.weight"]["bits"] == 3
    command("export", quantized, "-o", tmp_path / "kept", "--no-rotate", "--set", "*=16")
    written, checkpoint = load_file(tmp_path / "kept" / "model.safetensors"), kappaquant.open_checkpoint(quantized)
    for name in (f"{layer}{part}_proj.weight" for part in "qkvo"):
        assert torch.equal(written[name], checkpoint.dequantize(name))


def test_it_needs_no_converting(quantized: Path) -> None:
    refused = CliRunner().invoke(app, ["convert", str(quantized), "-o", str(quantized.parent / "converted")])
    assert "is kappaquant already, and needs no converting" in str(refused.exception)


def test_transformers_loads_it_by_itself(quantized: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    assert {m.fmt.id for m in model.modules() if isinstance(m, PackedWeight)} >= {"t2g128", "t3g64", "t4g32"}
    again, _ = kappaquant.load(quantized, dtype=torch.float32)
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_plans_choose_it_where_they_may(source: Path, tmp_path: Path) -> None:
    plan, evidence = tmp_path / "plan.json", tmp_path / "evidence.json"

    def chosen(*options: object) -> set[str]:
        command("plan", source, "-o", plan, *options)
        return {entry["format"] for entry in json.loads(plan.read_text())["tensors"].values()}

    by = "--policy", "uniform", "--bits", 2, "--group-size", 32
    assert chosen(*by, "--formats", "k,t") == {"kept", "t2g32"}
    assert chosen(*by) == {"kept", "tq2g32"}
    command("calibrate", source, "-o", evidence, "--data-free", "--formats", "k,t", "--jobs", 1, "--device", "cpu")
    assert any(fmt.startswith("t3g") for fmt in chosen("--evidence", evidence, "--bits-per-weight", 4))
    command("calibrate", source, "-o", evidence, "--data-free", "--formats", "t", "--jobs", 1, "--device", "cpu")
    page = tmp_path / "page.html"
    command(
        "plan", source, "-o", plan, "--formats", "t", "--evidence", evidence, "--bits-per-weight", 4, "--explore", page
    )
    assert {entry["format"][:2] for entry in json.loads(plan.read_text())["tensors"].values()} <= {
        "t2",
        "t3",
        "t4",
        "ke",
    }
    assert '"formats":["t2","t3","t4","16"]' in page.read_text()
    assert {entry["format"] for entry in planned_by(source, plan, "*_proj.weight=t2").values()} >= {"kept", "t2g128"}


def planned_by(source: Path, plan: Path, override: str) -> dict[str, dict[str, str]]:
    command("plan", source, "-o", plan, "--policy", "uniform", "--group-size", 128, "--set", override)
    return json.loads(plan.read_text())["tensors"]


def test_kernels_that_do_not_take_it_say_why() -> None:
    fmt = registry.format_by_id("t3g64", "w")
    parts = fmt.encode(torch.ones(2, 64)).parts
    reasons = {kernel.name: kernel.refusal(fmt, parts) for kernel in dispatch.kernels()}
    assert reasons.pop("any format") is None
    assert (reasons.pop("native") or "") == absence()
    assert reasons.pop("tensor_cores") == "needs an NVIDIA GPU, got a tensor on cpu"
    assert reasons
    assert all(reason and "codebook formats, not t3g64" in reason for reason in reasons.values())
