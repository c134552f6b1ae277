"""An export that is killed and started again ends with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import digests
from mlx_exports import MIXED, export, save

import kappaquant
from kappaquant.checkpoints import writer as folders
from kappaquant.exports.mlx import slabs, writer

DRIVER = """
import sys
import torch
torch.set_num_threads(1)
import kappaquant
from kappaquant.checkpoints import writer as folders
from kappaquant.exports.mlx import slabs, writer
from kappaquant.exports.mlx.writer import Options, export_mlx

slabs.SLAB_ELEMENTS = 1 << 14
folders.COMMIT_SECONDS = float(sys.argv[4])
if __name__ == "__main__":
    source = kappaquant.open_source(sys.argv[1])
    plan = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3)
    export_mlx(source, sys.argv[2], plan, Options(jobs=int(sys.argv[3])))
"""


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "source", tokenizer=False)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), str(source)]
    subprocess.run([*command, str(tmp_path / "expected"), "2", "2"], check=True, timeout=300)
    output, moments, counts = tmp_path / "out", random.Random(0), [0]
    journal = tmp_path / "out.partial" / "journal.jsonl"

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for _ in range(2):
        process = subprocess.Popen([*command, str(output), "1", "0"], stderr=subprocess.PIPE)
        wanted = counts[-1] + moments.randint(3, 20)
        while process.poll() is None and lines() < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(lines())
        assert not output.exists()
    assert counts == sorted(set(counts)), "a run lost what an earlier one had finished"
    subprocess.run([*command, str(output), "1", "0"], check=True, timeout=300)
    assert digests(output) == digests(tmp_path / "expected")
    assert not journal.parent.exists()


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3_5_moe"))]
)
def test_how_tensors_are_cut_decides_no_weight(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slabs of rows, of columns and of single experts give the bytes of whole tensors."""
    source = save(architecture, tmp_path / "source", tokenizer=False, tied=True, intermediate_size=512)
    export(source, tmp_path / "whole", MIXED)
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 1 << 13)
    export(source, tmp_path / "cut", MIXED)
    whole, cut = digests(tmp_path / "whole"), digests(tmp_path / "cut")
    assert whole["model.safetensors"] == cut["model.safetensors"]
    assert whole["config.json"] == cut["config.json"]


def test_finished_work_and_checks_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save("llama", tmp_path / "source", tokenizer=False)
    export(source, tmp_path / "expected", MIXED)
    real, done = writer.make_slab, []

    def some(unit: slabs.SlabWork) -> slabs.Sums:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(unit.tensor)
        return real(unit)

    monkeypatch.setattr(folders, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(writer, "make_slab", some)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", MIXED)
    with pytest.raises(
        kappaquant.OutputError, match=r"out\.partial: left by a run with another source, plan or options"
    ):
        export(source, tmp_path / "out", MIXED, rotate=False)
    again: list[str] = []
    monkeypatch.setattr(writer, "make_slab", lambda unit: (again.append(unit.tensor), real(unit))[1])
    monkeypatch.setattr(writer.Check, "run", lambda *arguments: pytest.fail("checked twice"))
    export(source, tmp_path / "out", MIXED)
    assert len(done) == 7
    assert not set(done) & set(again)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "out", "source"]
