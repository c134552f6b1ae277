"""The one way that folders are written: cut off anywhere and run again, a folder ends with the bytes of an uninterrupted run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import digests, quantize, write_source

import kappaquant
from kappaquant.checkpoints import writer
from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.checkpoints.writer import Writer
from kappaquant.errors import OutputError, PlanError
from kappaquant.exports import kappaquant_v1, plain
from kappaquant.files import tensors as stored_tensors
from kappaquant.files.safetensors import TensorInfo
from kappaquant.quantizing import quantize as quantizing

Run = Callable[[Path], Any]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stored_tensors, "SLICE_ELEMENTS", 4096)  # several slices of a tensor
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    return write_source(tmp_path / "source", shards=2)


def quantize_native(source: Path, output: Path) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, group_size=128)
    kappaquant.quantize(opened, output, plan, kappaquant.Options(container="tq3_native"))


def runs(source: Path) -> dict[str, tuple[Run, Any, str]]:
    """What writes folders: the call, the module that makes its pieces, and the function that makes one."""
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config)
    v1 = quantize(source, source.parent / "v1")
    quantize_native(source, source.parent / "native")
    native = kappaquant.open_checkpoint(source.parent / "native", source=source)
    return {
        "quantize": (lambda out: kappaquant.quantize(opened, out, plan), quantizing, "encode_slice"),
        "dequantize": (lambda out: plain.dequantize(v1, out), plain, "_decode"),
        "convert": (lambda out: kappaquant_v1.convert(native, out), kappaquant_v1, "_copy"),
    }


@pytest.mark.parametrize("name", ["quantize", "dequantize", "convert"])
def test_a_run_that_was_cut_off_goes_on(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module, function = runs(source)[name]
    run(tmp_path / "expected")
    made, again = [], []
    real = getattr(module, function)

    def some(piece: Any) -> Any:
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append((piece.tensor, piece.start))
        return real(piece)

    def rest(piece: Any) -> Any:
        again.append((piece.tensor, piece.start))
        return real(piece)

    monkeypatch.setattr(module, function, some)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, function, rest)
    run(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert len(made) == 9
    assert not set(made) & set(again)
    assert not (tmp_path / "out.partial").exists()


def unfinished(output: Path, **options: Any) -> Writer[None]:
    return Writer(output, "f", inside=None, total=4, stage="make", **{"progress": lambda *_: None, **options})


class Piece:
    tensor, start, nbytes = "w", 0, 4


def cut_off(started: Writer[None], problem: BaseException) -> None:
    with started:
        started.lay_out("model.safetensors", ShardLayout.of([TensorInfo("w", "U8", (4,))]))
        started.fill("model.safetensors", started.missing([Piece()]), lambda piece: None, None)
        raise problem


def test_what_a_refusal_leaves(tmp_path: Path) -> None:
    for keep, left in ((False, []), (True, ["out.partial"])):
        with pytest.raises(PlanError):
            cut_off(unfinished(tmp_path / "out", keep_refused=keep), PlanError("with other options it would do"))
        assert [p.name for p in tmp_path.iterdir()] == left


def test_places_where_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"lies in .*, which is read; choose another output"):
        writer.check_output(tmp_path / "a" / "b", tmp_path / "a")
    with pytest.raises(OutputError, match="no such folder; create it first"):
        unfinished(tmp_path / "absent" / "out")
    assert not list(tmp_path.iterdir())


def test_progress_counts_what_is_there(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cut_off(unfinished(tmp_path / "out", progress=lambda *report: seen.append(report)), KeyboardInterrupt())
    assert seen == [("make", 0, 4), ("make", 4, 4), ("make", 4, 4)]
