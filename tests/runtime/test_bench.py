"""What is measured is measured: every number present and plausible, on tiny models, for plain and packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import quantize
from command_line import Command
from tiny_models import save_tiny, tiny_model

from benchmarks import gpu_decode
from benchmarks.random_model import packed, plain
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.measures.throughput import token_bytes
from kappaquant.runtime.bench import Row, measure
from kappaquant.sources.open import open_source


def check(row: Row) -> None:
    assert row.decode_tokens_per_s == pytest.approx(row.batch / row.step_ms * 1e3)
    assert row.prefill_tokens_per_s == pytest.approx(row.batch * row.context / row.first_token_ms * 1e3)
    assert row.step_ms > 0
    assert row.peak_gib > 0


def test_rows_on_the_cpu() -> None:
    rows = list(measure(tiny_model("qwen3_5_moe"), [(1, 8), (2, 40)], steps=3))
    assert [(row.batch, row.context) for row in rows] == [(1, 8), (2, 40)]
    for row in rows:
        check(row)
        assert row.kernels_per_step is None
        assert not row.graph


@pytest.mark.parametrize(("case", "steps"), [((0, 8), 1), ((1, 0), 1), ((1, 8), 0)])
def test_numbers_below_one(case: tuple[int, int], steps: int) -> None:
    with pytest.raises(UnsupportedError, match="at least 1"):
        list(measure(tiny_model("llama"), [case], steps=steps))


def test_command_against_the_original(command: Command, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    quantized, output = quantize(source, tmp_path / "quantized").path, tmp_path / "bench.json"
    arguments = ["--context", 6, "--context", 9, "--batch", 2, "--steps", 2, "--device", "cpu", "-o", output]
    done = command("bench", quantized, "--against", source, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text(encoding="utf-8"))
    assert result["device"] == "cpu"
    assert [(row["model"], row["batch"], row["context"]) for row in result["rows"]] == [
        (str(name), 2, context) for name in (quantized, source) for context in (6, 9)
    ]
    for row in result["rows"]:  # of two rows at once, which may meet different experts
        assert (row["weights_gb_per_s"], row["of_bandwidth"]) == (None, None)
    assert "decode tok/s" in command("bench", quantized, *arguments).stdout


def test_command_says_what_steps_read_of_the_bandwidth(command: Command, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    quantized = quantize(source, tmp_path / "quantized").path
    done = command("bench", quantized, "--against", source, "--context", 6, "--steps", 2, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["threads"] == torch.get_num_threads()
    opened = open_checkpoint(quantized), open_source(source)
    for row, model in zip(result["rows"], opened, strict=True):
        assert row["weight_bytes_per_token"] == token_bytes(model)
        rate = row["decode_tokens_per_s"] * row["weight_bytes_per_token"] / 1e9
        assert row["weights_gb_per_s"] == pytest.approx(rate, abs=0.006)
        assert row["of_bandwidth"] == pytest.approx(rate / result["read_gb_per_s"], abs=0.01)


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_model() -> None:
    """Every variant that runs on the card, made and measured here."""
    model = tiny_model("qwen3_5_moe_text")
    cases = ((1, 4), (2, 9))
    variants = {name: (make, cases, graph) for name, (make, _, graph) in gpu_decode.VARIANTS.items()}
    rows = list(gpu_decode.rows(model.config, "cpu", variants, steps=2))
    assert [row["model"] for row in rows] == [name for name in variants for _ in cases]
    assert all(row["decode_tokens_per_s"] > 0 for row in rows)


def test_packed_models_are_smaller_and_speak_finite_logits() -> None:
    config = tiny_model("qwen3_5_moe_text").config
    model, small = plain(config, "cpu"), packed(config, "cpu", policy="recipe", recipe="apex2")
    assert gpu_decode.held_bytes(small) < gpu_decode.held_bytes(model)
    for made in (model, small):
        with torch.no_grad():
            logits = made(torch.arange(12)[None]).logits
        assert logits.isfinite().all()
        assert logits.std() > 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_rows_on_a_gpu() -> None:
    model = tiny_model("qwen3_5_moe_text").to("cuda", torch.bfloat16)
    (row,) = measure(model, [(2, 40)], steps=8)
    check(row)
    assert row.graph
    assert row.kernels_per_step
