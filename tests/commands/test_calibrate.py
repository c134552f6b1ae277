"""The calibrate command: evidence of a text, of the model's own, or of weights alone; and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from command_line import run_here

from kappaquant import open_source
from kappaquant.commands import calibrating
from kappaquant.kernels.cpu.library import absence
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.quantizing.calibration import trials
from kappaquant.quantizing.calibration.written import model_of

FAST = ("--effort", "best", "--group-size", 32, "--device", "cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_models.save_tiny("llama", tmp_path / "tiny")
    tiny_models.character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Whatever a model reads while each of its parts is tried. " * 8)
    return path


def test_evidence_says_what_it_is_of(source: Path, text: Path, tmp_path: Path) -> None:
    done = run_here(
        "calibrate", source, "-o", tmp_path / "e.json", "--calibration", text, "--calibration-tokens", 96, *FAST
    )
    assert done.returncode == 0, done.stderr
    assert f"KLD in {'k3' if absence() else 't3'}" in done.stdout
    assert "embedding" in done.stdout
    found, model = Sensitivities.load(tmp_path / "e.json"), model_of(open_source(source))
    assert (found.kind, found.model, found.sha256) == ("calibration", "tiny", model.sha256)
    assert (found.effort, found.group_size) == ("best", 32)
    assert found.text["file"] == "text.txt"
    assert found.text["tokens"] == 96
    assert all(unit.kld is not None and unit.bits == 3 for unit in found.units)


def test_without_a_file_the_model_writes(source: Path, tmp_path: Path) -> None:
    done = run_here("calibrate", source, "-o", tmp_path / "e.json", "--calibration-tokens", 64, *FAST, "--bits", 4)
    assert done.returncode == 0, done.stderr
    found = Sensitivities.load(tmp_path / "e.json")
    assert found.text["written_by"]["model"] == "tiny"
    assert {unit.bits for unit in found.units} == {4}
    assert calibrating.kept_text(tmp_path / "e.json").exists()


@pytest.mark.parametrize(
    ("options", "tried", "known"),
    [
        (("--formats", "k,t", "--bits", "t2"), "t2", "kt"),
        (("--bits", "t4"), "t4", "kt"),
        (("--formats", "k,t", "--bits", "k3"), "k3", "kt"),
        (("--formats", "k,t"), "t3", "kt"),
        (("--formats", "k,t", "--bits", "5"), "k5", "kt"),
        (("--formats", "t"), "t3", "t"),
        (("--formats", "k"), "k3", "k"),
    ],
)
def test_parts_are_tried_in_the_format_that_is_named(
    options: tuple[str, ...], tried: str, known: str, source: Path, text: Path, tmp_path: Path
) -> None:
    by = "--calibration", text, "--calibration-tokens", 48
    done = run_here("calibrate", source, "-o", tmp_path / "e.json", *by, *FAST, *options)
    assert done.returncode == 0, done.stderr
    assert f"KLD in {tried}" in done.stdout
    found = Sensitivities.load(tmp_path / "e.json")
    assert {f"{unit.kind}{unit.bits}" for unit in found.units} == {tried}
    found.check_measured(found.tensors, known)
    assert found.kinds == tuple(known)
    assert len(next(iter(found.tensors.values())).errors) == {"kt": 10, "t": 3, "k": 7}[known]


@pytest.mark.parametrize(
    ("rounded", "tried", "said"), [(True, "t3", "codebooks and trellis codes"), (False, "k3", "codebooks")]
)
def test_all_kinds_are_measured_where_kernels_round_them(
    rounded: bool, tried: str, said: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(trials, "kinds_by_kernels", lambda device: ("k", "t") if rounded else ("k",))
    by = "--calibration", text, "--calibration-tokens", 48
    done = run_here("calibrate", source, "-o", tmp_path / "e.json", *by, *FAST)
    assert done.returncode == 0, done.stderr
    assert f"KLD in {tried}" in done.stdout
    assert f"e.json: of {said}, for kappaquant plan --evidence" in done.stdout
    assert ("trellis codes are not measured: no kernel rounds them on cpu" in caplog.text) is not rounded


@pytest.mark.parametrize(("bits", "measured"), [("k3", "codebooks"), ("t3", "codebooks and trellis codes")])
def test_a_kind_that_is_named_is_measured_too(
    bits: str, measured: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "kinds_by_kernels", lambda device: ("k",))
    by = "--calibration", text, "--calibration-tokens", 48
    done = run_here("calibrate", source, "-o", tmp_path / "e.json", *by, *FAST, "--bits", bits)
    assert done.returncode == 0, done.stderr
    assert f"KLD in {bits}" in done.stdout
    assert f"e.json: of {measured}, for" in done.stdout


def test_without_text_it_says_so(source: Path, tmp_path: Path) -> None:
    done = run_here(
        "calibrate", source, "-o", tmp_path / "e.json", "--data-free", "--group-size", 32, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert "no text was read: errors of weights alone" in done.stdout
    found = Sensitivities.load(tmp_path / "e.json")
    assert (found.kind, found.text) == ("weights", {})
    assert all(unit.kld is None and unit.bits is None for unit in found.units)
    known = found.tensors["model.layers.0.mlp.up_proj.weight"]
    both = [f"tq{bits}g32" for bits in range(2, 9)] + [f"t{bits}g32" for bits in (2, 3, 4)]
    assert list(known.errors) == (both[:7] if absence() else both)
    assert set(found.kurtosis) == set(found.tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--effort", "fast"), "--effort fast: must be calibrated or best"),
        (("--data-free", "--calibration-tokens", 5), "--data-free reads no text"),
        (("--bits", 9, "--calibration", "text.txt"), "bits = 9"),
        (("--bits", "t5"), "--bits t5: trellis codes have no width of 5 bits; there are t2, t3, t4"),
        (("--bits", "tq3"), "--bits 'tq3': must be a width, 2 to 8, or one with its kind such as t3"),
        (("--bits", "t3", "--formats", "k"), "formats k: parts are tried in 't', which is none of these"),
        (("--formats", "t", "--bits", 5), "bits = 5: parts are tried in trellis codes, which have 2, 3, 4 bits"),
        (("--group-size", 48), "--group-size|group size 48"),
        (("--calibration", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--calibration-tokens", 1, "--calibration", "text.txt"), "--calibration-tokens 1: must be 2 or more"),
    ],
)
def test_what_is_refused(
    options: tuple[object, ...], message: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("calibrate", source, "-o", "e.json", "--device", "cpu", *options)
    assert done.returncode == 2
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert not (tmp_path / "e.json").exists()


def test_text_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    other = tiny_models.save_tiny("qwen3", tmp_path / "other")
    tiny_models.character_tokenizer().save_pretrained(other)
    written = tmp_path / "other.jsonl"
    assert run_here("write", other, "-o", written, "--tokens", 64, "--device", "cpu").returncode == 0
    done = run_here("calibrate", source, "-o", tmp_path / "e.json", "--calibration", written, *FAST)
    assert done.returncode == 2
    assert "calibration text of another model or revision" in done.stderr
