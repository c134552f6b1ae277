"""The demo: the commands that it prints do what it does, and its result has every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import digests
from command_line import run_here

import kappaquant
from benchmarks.readme import result
from kappaquant.engines.transformers.original import load_original, load_tokenizer
from scripts import demo

PLAIN = [name for name in demo.VARIANTS if not name.endswith(demo.CALIBRATED)]


def weights(folder: Path) -> dict[str, str]:
    """Digests of the weight files."""
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def test_calibrated_variants_have_the_plan_of_plain_ones() -> None:
    calibrated = [name for name in demo.VARIANTS if name not in PLAIN]
    assert calibrated
    for name in calibrated:
        assert demo.VARIANTS[name] == demo.VARIANTS[name.removesuffix(demo.CALIBRATED)]


@pytest.mark.parametrize("name", [PLAIN[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PLAIN[1:])])
def test_printed_commands_write_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    source = kappaquant.open_source(demo.MODEL)
    profile = kappaquant.scan(source, jobs=1)
    profile.save(tmp_path / "profile.json")
    plan = kappaquant.make_plan(source.tensors, source.config, profile=profile.kurtosis(), **demo.VARIANTS[name])
    ours = kappaquant.quantize(source, tmp_path / "ours", plan)
    done = run_here(*demo.quantizing(name, str(demo.MODEL), tmp_path / "theirs"))
    assert done.returncode == 0, done.stderr
    assert weights(ours)
    assert weights(tmp_path / "theirs") == weights(ours)


@pytest.mark.slow
def test_the_printed_command_calibrates_on_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TOKENS", 600)
    name = next(name for name in demo.VARIANTS if name not in PLAIN)
    source = kappaquant.open_source(demo.MODEL)
    calibration = demo.written(source, load_original(source, "cpu"), load_tokenizer(source))
    plan = kappaquant.make_plan(source.tensors, source.config, **demo.VARIANTS[name])
    ours = kappaquant.quantize(source, tmp_path / "ours", plan, calibration=calibration)
    done = run_here(*demo.quantizing(name, str(demo.MODEL), tmp_path / "theirs"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert weights(ours)
    assert weights(tmp_path / "theirs") == weights(ours)


def test_commands_are_shown_as_one_types_them(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    demo.show(demo.quantizing("uniform 2, calibrated", str(demo.MODEL), demo.OUTPUT / "x y"), Console())
    assert capsys.readouterr().out == (
        "$ kappaquant quantize reference/model -o 'demo/x y' --policy uniform --bits 2 "
        f"--effort calibrated --calibration-tokens {demo.TOKENS}\n"
    )


def test_the_result_has_every_variant_and_calibration_takes_no_bytes() -> None:
    found = {v["name"]: v for v in result("demo")["variants"]}
    assert list(found) == ["bf16", *demo.VARIANTS]
    for name in set(demo.VARIANTS) - set(PLAIN):
        plain = found[name.removesuffix(demo.CALIBRATED)]
        assert found[name]["bits_per_weight"] == plain["bits_per_weight"]
        assert abs(found[name]["bytes"] - plain["bytes"]) < 64, "weight files differ in their hashes at most"
        assert found[name]["kld_nats"]["mean"] < plain["kld_nats"]["mean"]
