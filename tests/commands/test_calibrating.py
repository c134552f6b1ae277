"""Calibrated rounding without a file: the model writes its own text, which is kept, told and never half there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from builders import digests
from command_line import run_here

from kappaquant import open_source
from kappaquant.commands import calibrating
from kappaquant.engines.transformers import original
from kappaquant.errors import UnsupportedError
from kappaquant.quantizing.calibration.rounding import Pass
from kappaquant.runtime import writing
from reference.evaluate import MODEL

PLAN = ("--policy", "uniform", "--bits", 4, "--group-size", 32, "--device", "cpu")
CALIBRATED = (*PLAN, "--effort", "calibrated", "--calibration-tokens", 600)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_models.save_tiny("llama", tmp_path / "tiny")
    tiny_models.character_tokenizer().save_pretrained(folder)
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "kappaquant.json").read_text())


def cut_off(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the model was asked to write")


@pytest.mark.slow
def test_the_bundled_model_calibrates_itself(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_here(
        "quantize", MODEL, "-o", out, "--policy", "uniform", "--bits", 3, "--effort", "calibrated", "--calibration-tokens", 700,
        "--device", "cpu", "--set", "*.experts.*=16", "--set", "*.linear_attn.*=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "out.calibration.jsonl: what the model wrote" in done.stdout
    assert "calibration text: write" in done.stderr
    found = manifest(out)
    assert found["effort"] == "calibrated"
    assert found["calibration"]["tokens"] == 700
    assert found["calibration"]["written_by"]["model"] == Path(MODEL).name
    assert "file" not in found["calibration"], "the output's name would be part of its bytes"
    card = run_here("verify", out)
    assert card.returncode == 0, card.stderr


def test_the_same_bytes_again_and_through_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for out in (one, two):
        assert run_here("quantize", source, "-o", out, *CALIBRATED).returncode == 0
    assert digests(one) == digests(two)
    kept = calibrating.kept_text(one)
    assert kept.read_bytes() == calibrating.kept_text(two).read_bytes()
    shutil.rmtree(one)
    monkeypatch.setattr(calibrating, "_write", never)
    assert run_here("quantize", source, "-o", one, *CALIBRATED).returncode == 0, "the text that was kept is used"
    assert digests(one) == digests(two)
    options = (*PLAN, "--calibration", kept, "--calibration-tokens", 600)
    assert run_here("quantize", source, "-o", three, *options).returncode == 0
    assert manifest(three)["calibration"] == {"file": kept.name, **manifest(one)["calibration"]}
    assert manifest(three)["sha256"] == manifest(one)["sha256"]


def test_a_run_cut_off_while_writing_or_rounding_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_here("quantize", source, "-o", whole, *CALIBRATED).returncode == 0
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_continuation", cut_off)
        assert run_here("quantize", source, "-o", out, *CALIBRATED).returncode == 130
    assert sorted(tmp_path.iterdir()) == before, "nothing is left of half a text"
    rounded, left = Pass._write, iter(range(3))

    def some(*args: Any, **kwargs: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        rounded(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "_write", some)
        assert run_here("quantize", source, "-o", out, *CALIBRATED).returncode == 130
    assert (tmp_path / "out.partial").is_dir()
    monkeypatch.setattr(calibrating, "_write", never)
    assert run_here("quantize", source, "-o", out, *CALIBRATED).returncode == 0
    assert digests(out) == digests(whole)
    assert calibrating.kept_text(out).read_bytes() == calibrating.kept_text(whole).read_bytes()


@pytest.mark.parametrize("change", ["model", "tokens", "seeds"])
def test_a_text_of_something_else_is_written_anew(
    source: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_here("quantize", source, "-o", whole, *CALIBRATED).returncode == 0
    first, *rows = calibrating.kept_text(whole).read_text().splitlines()
    header = json.loads(first)
    match change:
        case "model":
            header["written_by"]["sha256"] = "0" * 64
        case "tokens":
            header["tokens"] = 601
        case "seeds":
            header["seeds_sha256"] = "0" * 64
    calibrating.kept_text(out).write_text("\n".join([json.dumps(header), rows[0], rows[0], ""]))
    assert run_here("quantize", source, "-o", out, *CALIBRATED).returncode == 0
    assert calibrating.kept_text(out).read_text().splitlines() == [first, *rows]
    assert digests(out) == digests(whole)


def test_another_models_text_is_refused(source: Path, tmp_path: Path) -> None:
    other = tiny_models.save_tiny("qwen3", tmp_path / "other")
    tiny_models.character_tokenizer().save_pretrained(other)
    text = tmp_path / "text.jsonl"
    written = run_here("write", other, "-o", text, "--tokens", 100, "--device", "cpu")
    assert written.returncode == 0, written.stderr
    before = sorted(tmp_path.iterdir())
    done = run_here("quantize", source, "-o", tmp_path / "out", *PLAN, "--calibration", text)
    assert done.returncode == 2
    assert "text.jsonl: calibration text of another model or revision: written by other" in done.stderr
    assert "to be quantized is tiny" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_writes_for_its_source(source: Path, tmp_path: Path) -> None:
    packed, text, out = tmp_path / "packed", tmp_path / "text.jsonl", tmp_path / "out"
    assert run_here("quantize", source, "-o", packed, *PLAN, "--effort", "fast").returncode == 0
    written = run_here("write", packed, "-o", text, "--tokens", 300, "--device", "cpu")
    assert written.returncode == 0, written.stderr
    assert "text.jsonl: 300 tokens written by" in written.stdout
    assert run_here("quantize", source, "-o", out, *PLAN, "--calibration", text).returncode == 0
    found = manifest(out)["calibration"]
    assert found["file"] == "text.jsonl"
    assert found["written_by"]["model"] == "tiny"
    assert found["written_by"]["quantized"] == "kappaquant"


def test_a_model_that_does_not_fit_says_what_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original, "free_memory", lambda device: 1000)
    before = sorted(tmp_path.iterdir())
    done = run_here("quantize", source, "-o", tmp_path / "out", *CALIBRATED)
    assert done.returncode == 2
    assert "as float32, cpu has 0.0 GB free" in done.stderr
    assert "give --calibration FILE" in done.stderr
    assert "kappaquant write CHECKPOINT" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_what_ends_a_run_is_met_before_the_model_writes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "_write", never)
    gemma = tiny_models.save_tiny("gemma3", tmp_path / "gemma")
    tiny_models.character_tokenizer().save_pretrained(gemma)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    in_the_way = calibrating.kept_text(tmp_path / "out")
    in_the_way.write_text('{"text": "mine"}\n')
    for arguments, message in (
        ((gemma, "-o", tmp_path / "new", *CALIBRATED), "quantize without --calibration"),
        ((source, "-o", taken, *CALIBRATED), "exists and is not empty"),
        ((source, "-o", tmp_path / "no" / "out", *CALIBRATED), "no such folder; create it first"),
        ((source, "-o", source / "out", *CALIBRATED), "which is read"),
        ((source, "-o", tmp_path / "out", *CALIBRATED), "is in the way of the calibration text"),
        (
            (
                source,
                "-o",
                tmp_path / "native",
                "--effort",
                "calibrated",
                "--format",
                "tq3_native",
                "--policy",
                "uniform",
            ),
            "--format tq3_native is not calibrated",
        ),
    ):
        done = run_here("quantize", *arguments)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
    assert in_the_way.read_text() == '{"text": "mine"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gemma", "out.calibration.jsonl", "taken", "tiny"]


def test_a_streamed_model_does_not_write(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = replace(open_source(source), folder=None)
    monkeypatch.setattr(calibrating, "_write", never)
    monkeypatch.setattr(original, "load_tokenizer", lambda source: tiny_models.character_tokenizer())
    with pytest.raises(UnsupportedError, match="leave out --stream, or give --calibration FILE"):
        calibrating.calibration_of(streamed, tmp_path / "out", None, None, "cpu")


def test_what_write_refuses(source: Path, tmp_path: Path) -> None:
    bare = tiny_models.save_tiny("llama", tmp_path / "bare")
    packed = tmp_path / "packed"
    assert run_here("quantize", bare, "-o", packed, *PLAN, "--effort", "fast").returncode == 0
    for arguments, message in (
        ((source, "-o", tmp_path / "text.txt"), "must be named .jsonl"),
        ((source, "-o", tmp_path / "no" / "text.jsonl"), "create it first"),
        ((source, "-o", tmp_path / "text.jsonl", "--tokens", 1), "--tokens 1: must be 2 or more"),
        ((bare, "-o", tmp_path / "text.jsonl"), "has no tokenizer (tokenizer.json"),
        ((packed, "-o", tmp_path / "text.jsonl"), "has no tokenizer; copy"),
        ((packed, "-o", tmp_path / "text.jsonl", "--revision", "main"), "applies to a Hub id"),
        ((tmp_path / "absent", "-o", tmp_path / "text.jsonl"), "no such folder"),
    ):
        done = run_here("write", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert not list(tmp_path.glob("text*"))
