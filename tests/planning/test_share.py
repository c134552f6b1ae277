"""Plans that keep most of a model say so, and what; those that pack nothing are not carried out unasked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from command_line import run_here
from tiny_models import save_tiny

import kappaquant
from kappaquant.errors import PlanError
from kappaquant.planning.share import mostly_kept, packed_share
from kappaquant.sources.source import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("share") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return kappaquant.open_source(folder)


def planned(source: Source, *overrides: tuple[str, int]) -> kappaquant.Plan:
    return kappaquant.make_plan(source.tensors, source.config, "uniform", overrides=overrides)


def test_bytes_of_the_whole_file_count(source: Source) -> None:
    plan = planned(source)
    total = sum(info.nbytes for info in source.tensors.values())
    kept = sum(info.nbytes for name, info in source.tensors.items() if not name.endswith("_proj.weight"))
    assert packed_share(plan, source.tensors) == pytest.approx(1 - kept / total)
    assert not mostly_kept(plan, source.tensors, source.config)


def test_what_is_kept_is_named_with_its_share_and_why(source: Source) -> None:
    plan = planned(source, ("*.mlp.*", 16), ("*.q_proj.weight", 16))
    said = mostly_kept(plan, source.tensors, source.config)
    sizes = {name: info.nbytes for name, info in source.tensors.items()}
    total = sum(sizes.values())
    gate_up = sum(size for name, size in sizes.items() if "gate_proj" in name or "up_proj" in name)
    assert said.startswith(f"packs {packed_share(plan, source.tensors):.1%} of the bytes, and keeps ")
    assert (
        f"mlp gate_proj / up_proj {gate_up / total:.1%} (model.layers.0.mlp.gate_proj.weight: set by '*.mlp.*')" in said
    )
    assert "\n" not in said


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_the_commands_say_it_first(
    command: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = ("-o", tmp_path / "out") if command == "quantize" else ()
    with caplog.at_level(logging.WARNING, "kappaquant"):
        assert run_here(command, folder, "--bits", "4", *out).returncode == 0
        assert not caplog.records
        sets = ("--set", "*.mlp.*=16", "--set", "*.q_proj.weight=16")
        two = ("-o", tmp_path / "two") if out else ()
        assert run_here(command, folder, "--bits", "4", *sets, *two).returncode == 0
    (said,) = caplog.messages
    assert "the plan packs" in said
    assert "mlp gate_proj / up_proj" in said


@pytest.mark.parametrize("by", ["options", "plan file"])
def test_nothing_is_packed_only_when_asked_for(by: str, folder: Path, tmp_path: Path) -> None:
    how = ["--bits", "16"]
    if by == "plan file":
        run_here("plan", folder, *how, "-o", tmp_path / "plan.json")
        how = ["--plan", str(tmp_path / "plan.json")]
    done = run_here("quantize", folder, "-o", tmp_path / "out", *how)
    assert done.returncode == 2
    assert "packs 0.0% of the bytes, and keeps" in done.stderr
    assert "--allow-nothing" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run_here("quantize", folder, "-o", tmp_path / "out", *how, "--allow-nothing").returncode == 0
    assert set(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["tensors"].values()
    ) == {"BF16"}


def test_nor_from_python(source: Source, tmp_path: Path) -> None:
    plan = planned(source, ("*", 16))
    with pytest.raises(PlanError, match=r"the plan packs 0\.0% of the bytes"):
        kappaquant.quantize(source, tmp_path / "out", plan)
    kappaquant.quantize(source, tmp_path / "out", plan, kappaquant.Options(allow_nothing=True))
