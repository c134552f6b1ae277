"""Kept machine code: found again, bound to all that it depends on, and never trusted when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from kappaquant.kernels.cuda import cubins

CODE, NAME = b"\x7fELF\0machine\0code", b"_Z6kernel"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return cubins.folder()


def refuse() -> tuple[bytes, bytes]:
    raise AssertionError("compiled although it was kept")


def test_what_was_compiled_is_found_again(folder: Path) -> None:
    assert cubins.kept(["source", "sm_90"], lambda: (CODE, NAME + b"\0")) == (CODE, NAME + b"\0")
    code, name = cubins.kept(["source", "sm_90"], refuse)
    assert (code, name) == (CODE, NAME)
    with pytest.raises(AssertionError):
        cubins.kept(["source", "sm_80"], refuse)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b[:-1] + b"x", lambda b: b""])
def test_damaged_code_is_compiled_again(folder: Path, damage, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    cubins.kept(["a"], lambda: (CODE, NAME))
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cubins.kept(["a"], lambda: (b"again", NAME)) == (b"again", NAME)
    assert cubins.kept(["a"], refuse) == (b"again", NAME)


def test_a_home_that_can_not_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("a file in the way")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cubins.kept(["a"], lambda: (CODE, NAME)) == (CODE, NAME)
