"""What quantize refuses: one typed error that names the tensor or folder, nothing half-written, and nothing lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import EXPERTS, Q, quantize, refused, tensors, write_source
from choices import choice

import kappaquant
from kappaquant import NonFiniteError, OutputError, PlanError
from kappaquant.files import unfinished as journal
from kappaquant.formats.codebook import PACKED_SUFFIX
from kappaquant.planning.plan import Plan

# weights


@pytest.mark.parametrize("name", [Q, EXPERTS, "model.norm.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight(name: str, bad: float, tmp_path: Path) -> None:
    content = tensors()
    content[name].view(-1)[-3] = bad
    folder = write_source(tmp_path / "source", content, shards=2)
    with pytest.raises(NonFiniteError, match=rf"{name}: holds NaN or infinity.*--allow-nonfinite"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint = quantize(folder, tmp_path / "out", allow_nonfinite=True)
    assert checkpoint.bits(name) == 16
    kept = checkpoint.tensor(name)
    assert torch.equal(kept.view(torch.int16), content[name].view(torch.int16))
    others = quantize(write_source(tmp_path / "clean", tensors(), shards=2), tmp_path / "clean_out")
    for other in others.keys():
        if other != name and others.format_of(other):
            assert torch.equal(checkpoint.parts(other)[PACKED_SUFFIX], others.parts(other)[PACKED_SUFFIX]), other
    assert list(checkpoint.verify()) == []
    assert not (tmp_path / "out.partial").exists()


def test_weights_beyond_the_norms_of_float16(tmp_path: Path) -> None:
    content = tensors()
    content[Q] *= 1e7
    folder = write_source(tmp_path / "source", content)
    with pytest.raises(NonFiniteError, match=rf"{Q}: .*65504.*16 bits"):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert quantize(folder, tmp_path / "out", allow_nonfinite=True).bits(Q) == 16


# plans and outputs


@pytest.mark.parametrize(
    ("name", "message"), [("model.none.weight", "names 1 tensor the source does not have"), (Q, "leaves out 1 tensor")]
)
def test_plan_of_another_model(source: Path, name: str, message: str) -> None:
    opened = kappaquant.open_source(source)
    choices = dict(kappaquant.make_plan(opened.tensors, opened.config).choices)
    if name == Q:
        del choices[Q]
    else:
        choices[name] = choice(3)
    with pytest.raises(PlanError, match=f"{name}: the plan {message}"):
        kappaquant.quantize(opened, source.parent / "out", Plan(choices, 128, "by hand", {}))
    assert sorted(os.listdir(source.parent)) == ["source"]


def test_output_that_is_not_empty(source: Path) -> None:
    output = source.parent / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="out: exists and is not empty"):
        quantize(source, output)
    assert (output / "mine.txt").read_text() == "precious"
    assert sorted(os.listdir(source.parent)) == ["out", "source"]


def test_output_that_is_an_empty_folder(source: Path) -> None:
    (source.parent / "out").mkdir()
    assert quantize(source, source.parent / "out").bits(Q) == 3


@pytest.mark.parametrize("output", ["source", "source/out", "source/../source", "link"])
def test_output_in_the_source(source: Path, output: str) -> None:
    (source.parent / "link").symlink_to(source)
    before = sorted(os.listdir(source))
    with pytest.raises(OutputError, match="which is read"):
        quantize(source, source.parent / output)
    assert sorted(os.listdir(source)) == before


def test_output_below_a_folder_that_is_not_there(source: Path) -> None:
    with pytest.raises(OutputError, match=r"none: no such folder"):
        quantize(source, source.parent / "none" / "out")


def test_full_disk_shows_before_anything_is_encoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal, "allocate", full)
    refused(source, OutputError, "No space left on device; free space and run again")


def test_full_disk_in_the_middle_loses_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def full(descriptor: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    output = source.parent / "out"
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full; free space and run again to resume"):
        quantize(source, output)
    assert not output.exists()
    monkeypatch.undo()
    resumed = quantize(source, output)
    expected = quantize(source, source.parent / "expected")
    for path in expected.path.rglob("*"):
        if path.is_file():
            assert (resumed.path / path.relative_to(expected.path)).read_bytes() == path.read_bytes()
