"""What stands where an output shall come: others' files are never touched, and every leftover is understood."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
from builders import digests, quantize, write_source

import kappaquant
from kappaquant import OutputError
from kappaquant.checkpoints import writer
from kappaquant.files.unfinished import Partial, check_free
from kappaquant.quantizing import quantize as quantizer


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, output: Path) -> None:
    """Leave an output whose shards are encoded, but not hashed."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "hash_stored", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, output)


def test_a_folder_that_no_run_left_is_not_touched(source: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "precious").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial: is in the way"):
        quantize(source, tmp_path / "out")
    assert (foreign / "precious").read_text() == "mine"
    assert os.listdir(foreign) == ["precious"]


def test_a_source_named_like_the_leftovers_survives(tmp_path: Path) -> None:
    source = write_source(tmp_path / "model.partial")
    before = digests(source)
    with pytest.raises(OutputError, match=r"model\.partial: is in the way"):
        quantize(source, tmp_path / "model")
    assert digests(source) == before


def test_a_file_in_the_place_of_the_leftovers(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial: is in the way"):
        quantize(source, tmp_path / "out")
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_an_empty_leftover_is_taken_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    quantize(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("target", ["empty", "absent"])
def test_an_output_that_is_a_link(source: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert list(kappaquant.open_checkpoint(tmp_path / target).verify()) == []


def test_a_mount_point_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    with pytest.raises(OutputError, match=r"out: is a mount point.*folder inside it"):
        quantize(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_an_output_removed_after_its_last_step_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Partial) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    quantize(source, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "moved")
    assert not (tmp_path / "out.partial").exists()


def test_a_shard_lost_from_the_leftovers_is_encoded_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(quantize(source, tmp_path / "expected").path)
    interrupt(monkeypatch, source, tmp_path / "out")
    (tmp_path / "out.partial" / "checkpoint" / "model-00001-of-00002.safetensors").unlink()
    real, seen = quantizer.encode_slice, []

    def stop_after_two(unit: object) -> object:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(unit)
        return real(unit)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:  # killed once more, with the lost shard laid out anew and mostly empty
        patch.setattr(quantizer, "encode_slice", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    assert digests(quantize(source, tmp_path / "out").path) == expected


def test_a_removal_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = Partial(tmp_path / "x", "f")
    unlinked: list[Path] = []

    def killed(self: Path, missing_ok: bool = False) -> None:
        unlinked.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            partial.discard()
    assert unlinked == [tmp_path / "x.partial" / "journal.jsonl"]
    assert not partial.folder.exists()
    partial.close()
    Partial(tmp_path / "x", "f").discard()
    assert not (tmp_path / "x.partial").exists()


def test_a_corrupted_journal(tmp_path: Path) -> None:
    Partial(tmp_path / "out", "f").close()
    with (tmp_path / "out.partial" / "journal.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(OutputError, match=r"journal\.jsonl: corrupted.*delete"):
        Partial(tmp_path / "out", "f")


def test_a_line_that_did_not_fit_is_forgotten(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "out", "f")
    partial.append([{"tensor": "whole"}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (partial.journal.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            partial.append([{"tensor": "torn"}])
        partial.close()  # has nothing left to write, so it hides no error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Partial(tmp_path / "out", "f")
    assert again.records == [{"fingerprint": "f"}, {"tensor": "whole"}]
    again.discard()


def test_a_refusal_lets_go_of_the_lock(tmp_path: Path) -> None:
    Partial(tmp_path / "out", "f").close()
    with pytest.raises(OutputError, match="another source") as kept:
        Partial(tmp_path / "out", "g")
    Partial(tmp_path / "out", "f").discard()  # while the error, and with it the refused object, is still alive
    assert kept.value


def test_a_disk_full_at_the_journal(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(quantize(source, tmp_path / "expected").path)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="disk is full"):
            quantize(source, tmp_path / "out")
    assert digests(quantize(source, tmp_path / "out").path) == expected


def test_the_source_may_be_named_in_another_way(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, source, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    quantize(Path("source"), Path("out"))
    manifest = json.loads((tmp_path / "out" / "kappaquant.json").read_text())
    assert manifest["source"] == {"model": "source", "revision": None}


def test_a_place_that_is_taken_is_told_before_anything_is_made(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    check_free(taken)
    taken.mkdir()
    check_free(taken)
    (taken / "file").touch()
    with pytest.raises(OutputError, match="taken: exists and is not empty; choose another output or remove it"):
        check_free(taken)
    (tmp_path / "taken.partial").mkdir()  # it may be what an unfinished run named last; that one will tell
    check_free(taken)
