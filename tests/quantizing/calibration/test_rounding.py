"""Calibrated checkpoints: closer to the original in the same bytes, the same however they were made, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from builders import digests
from torch import Tensor, nn

import kappaquant
from kappaquant.errors import NonFiniteError, PlanError, UnsupportedError
from kappaquant.models.skeleton import load_config, model_class
from kappaquant.quantizing.calibration import layers as streamed
from kappaquant.quantizing.calibration import rounding
from kappaquant.quantizing.calibration.moments import watched
from kappaquant.quantizing.calibration.rounding import Pass
from kappaquant.quantizing.calibration.stacks import Stack, round_stack
from kappaquant.quantizing.calibration.text import Calibration

WINDOWS = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(0))
TEXT = Calibration(WINDOWS, {"file": "text.txt", "tokens": 512, "window": 32, "tokens_sha256": "a"})
HELD_OUT = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(1))


def quantize(folder: Path, name: str, calibration: Calibration | None = TEXT, bits: int = 3, **options: Any) -> Path:
    source = kappaquant.open_source(folder)
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=bits, group_size=32)
    made = kappaquant.Options(**options)
    return kappaquant.quantize(source, folder.parent / name, plan, made, calibration=calibration)


def divergence(folder: Path, checkpoint: Path) -> float:
    """Mean KL divergence from the original on other tokens."""
    opened, config = kappaquant.open_checkpoint(checkpoint), load_config(folder)
    state = {name: opened.dequantize(name).float() for name in opened.keys()}
    made = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    original = model_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = (torch.log_softmax(model(HELD_OUT).logits.float(), -1) for model in (original, made))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize(
    ("architecture", "experts"),
    [
        ("llama", "split"),
        ("qwen3_moe", "split"),
        ("qwen3_moe", "fused"),
        ("qwen3_5_moe_text", "fused"),
        ("qwen3_5_moe", "split"),
    ],
)
def test_closer_in_the_same_bytes(architecture: str, experts: tiny_models.Experts, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny(architecture, tmp_path / "source", experts=experts)
    calibrated, free = quantize(folder, "calibrated"), quantize(folder, "free", None)
    assert divergence(folder, calibrated) < 0.7 * divergence(folder, free)
    opened, other = kappaquant.open_checkpoint(calibrated), kappaquant.open_checkpoint(free)
    for name in opened.keys():
        assert opened.nbytes(name) == other.nbytes(name)
        assert opened.format_of(name) == other.format_of(name)
    manifest = json.loads((calibrated / "kappaquant.json").read_text())
    assert manifest["effort"] == "calibrated"
    assert manifest["calibration"] == TEXT.record
    assert "calibration" not in json.loads((free / "kappaquant.json").read_text())


def test_the_poorest_expert_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path / "source")
    quantize(folder, "calibrated", Calibration(WINDOWS[:1, :2], TEXT.record))  # two tokens reach few experts
    assert "the one that saw fewest tokens saw 0" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_streamed_layers_give_the_codes_of_a_model_that_fits(architecture: str, tmp_path: Path) -> None:
    """The whole model, its first layers rounded already, gives a linear layer the inputs that streaming gives it."""
    folder = tiny_models.save_tiny(architecture, tmp_path / "source")
    opened = kappaquant.open_checkpoint(quantize(folder, "calibrated"))
    config = load_config(folder)
    model: Any = model_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    source = kappaquant.open_source(folder)
    for number, layer in enumerate(model.get_decoder().layers):
        prefix = f"model.layers.{number}."
        linear = {f"{prefix}{n}": m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        packed = {n: m for n, m in linear.items() if opened.format_of(f"{n}.weight")}
        assert packed
        with torch.no_grad(), watched(packed) as (sums, _):
            for rows in WINDOWS.split(streamed.ROWS):
                model(rows)
        together: dict[Any, list[str]] = {}
        for name in packed:
            together.setdefault((id(sums[name]), opened.format_of(f"{name}.weight")), []).append(name)
        for (_, fmt), names in together.items():
            weights = [source.read(f"{n}.weight").view(source.tensors[f"{n}.weight"].shape) for n in names]
            stack = Stack(torch.cat(weights)[None], sums[names[0]].gram[None], fmt, names[:1])
            parts = round_stack(stack).parts
            for suffix, part in parts.items():
                written = torch.cat([opened.parts(f"{n}.weight")[suffix] for n in names])
                assert torch.equal(written, part[0]), f"{names}{suffix}"
        for name, parameter in layer.named_parameters():
            if f"{prefix}{name}" in opened.keys():
                parameter.data.copy_(opened.dequantize(f"{prefix}{name}"))
            elif "experts" in name:
                parameter.data.copy_(experts_of(opened, f"{prefix}{name}"))


def experts_of(opened: kappaquant.Checkpoint, name: str) -> Tensor:
    """A fused parameter from the matrices of single experts."""
    before, _, projection = name.rpartition(".")
    count = 1 + max(
        int(n.removeprefix(before + ".").split(".")[0]) for n in opened.keys() if n.startswith(before + ".")
    )
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    return torch.stack(
        [torch.cat([opened.dequantize(f"{before}.{e}.{part}.weight") for part in parts]) for e in range(count)]
    )


def test_a_run_that_is_cut_off_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path / "source")
    expected = digests(quantize(folder, "whole", jobs=1))
    assert digests(quantize(folder, "two_jobs", jobs=2)) == expected
    for method, after in (("_write", 1), ("_write", 5), ("_record", 0), ("_write", 3), ("_write", 2)):
        whole, left = getattr(Pass, method), iter(range(after))

        def cut_off(*args: Any, whole: Any = whole, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            whole(*args)

        monkeypatch.setattr(Pass, method, cut_off)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, "resumed")
        monkeypatch.setattr(Pass, method, whole)
    assert digests(quantize(folder, "resumed")) == expected


DRIVER = """
import sys

import torch

import kappaquant
from kappaquant.checkpoints import writer
from kappaquant.quantizing.calibration.text import Calibration

writer.COMMIT_SECONDS = 0.0
if __name__ == "__main__":
    windows = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(0))
    record = {"file": "text.txt", "tokens": 512, "window": 32, "tokens_sha256": "a"}
    source = kappaquant.open_source(sys.argv[1])
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3, group_size=32)
    options = kappaquant.Options(jobs=int(sys.argv[3]), device="cpu")
    kappaquant.quantize(source, sys.argv[2], plan, options, calibration=Calibration(windows, record))
"""


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    """Before anything is recorded, between records of a layer, and in the part that needs no calibration."""
    folder, driver, out = (
        tiny_models.save_tiny("qwen3_moe", tmp_path / "source"),
        tmp_path / "driver.py",
        tmp_path / "out",
    )
    driver.write_text(DRIVER)
    expected = digests(quantize(folder, "whole", jobs=1, device="cpu"))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    killed = []
    for jobs, lines in ((1, 0), (1, 3), (2, 20), (1, 2), (1, 40)):
        command = [sys.executable, str(driver), str(folder), str(out), str(jobs)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= before + lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        killed.append(process.returncode != 0)
        assert killed[-1] or out.exists()
        if out.exists():
            break
    assert sum(killed) >= 3
    assert digests(quantize(folder, "out", jobs=1, device="cpu") if not out.exists() else out) == expected


@pytest.mark.slow
def test_processes_that_share_the_layers_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As several GPUs do, on this CPU."""
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts="fused")
    expected = digests(quantize(folder, "whole", jobs=1))
    monkeypatch.setattr(rounding, "devices", lambda device: ["cpu"] * 3)
    assert digests(quantize(folder, "shared", jobs=1)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["split", "fused"])
def test_on_gpus(experts: tiny_models.Experts, tmp_path: Path) -> None:
    """As close as on a CPU, the same bytes each time, and on all GPUs of the host those of one."""
    folder = tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts=experts)
    one = quantize(folder, "one", device="cuda:0")
    assert divergence(folder, one) < 1.2 * divergence(folder, quantize(folder, "cpu", device="cpu"))
    assert digests(quantize(folder, "again", device="cuda:0")) == digests(one)
    assert digests(quantize(folder, "all", device="cuda")) == digests(one)


def test_another_text_does_not_resume_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    monkeypatch.setattr(Pass, "_round", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, "out")
    other = Calibration(WINDOWS, {**TEXT.record, "tokens_sha256": "b"})
    with pytest.raises(kappaquant.errors.OutputError):
        quantize(folder, "out", other)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    with pytest.raises(PlanError, match="--format tq3_native is not calibrated"):
        quantize(folder, "native", container="tq3_native")
    gemma = tiny_models.save_tiny("gemma3", tmp_path / "gemma")
    with pytest.raises(UnsupportedError, match="quantize without --calibration"):
        quantize(gemma, "out")


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    model = model_class(load_config(folder)).from_pretrained(folder)
    model.get_parameter("model.layers.1.input_layernorm.weight").data[3] = 3e38
    model.save_pretrained(folder)
    with pytest.raises(
        NonFiniteError, match=r"model\.layers\.1\.\S+: the calibration text gives it inputs that are NaN or infinite"
    ):
        quantize(folder, "out")
