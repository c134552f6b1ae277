"""Where the native core is, and what is said where there is none."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

import pytest

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.trellis import TRELLIS, Trellis
from kappaquant.kernels.cpu import library
from kappaquant.kernels.cpu.native import Native


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """What was found is kept for the process: not what these tests arrange."""
    kept = (library.absence, library.core, library._library)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def test_without_a_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_path", lambda: None)
    assert library.levels() == {}
    assert "for want of a C++ compiler" in library.absence()
    assert Native().refusal(CodebookFormat(4, 128), {}) == library.absence()
    with pytest.raises(UnsupportedError, match="install one"):
        library.core()


@pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("g++"), reason="there is no compiler here")
def test_where_there_is_a_compiler_the_core_is_built() -> None:
    """Or all tests of it would be skipped, and nobody would know."""
    assert library.levels(), library.absence()


def test_a_file_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_core.so").write_text("not a library")
    monkeypatch.setattr(library, "_path", lambda: tmp_path / "_core.so")
    assert library.absence().startswith("the native core cannot be loaded (")


def test_a_processor_without_the_instruction_sets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "levels", lambda: {"avx512": False, "avx2": False})
    assert library.absence() == "this processor has none of the instruction sets of the native core (avx512, avx2)"


@pytest.mark.skipif(bool(library.absence()), reason=library.absence())
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(library.Weight):
        _fields_ = (("more", library.c_int64),)

    monkeypatch.setattr(library, "Weight", Longer)
    assert "of another version of kappaquant; install the package again" in library.absence()


@pytest.mark.skipif(bool(library.absence()), reason=library.absence())
def test_a_library_of_another_trellis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taps = [library.core().library.kq_trellis_taps(bit) for bit in range(2)]
    assert taps == [sum(1 << back for back in backs) for backs in (TRELLIS.lower, TRELLIS.upper)]
    library._library.cache_clear()
    library.absence.cache_clear()
    monkeypatch.setattr(library, "TRELLIS", Trellis(TRELLIS.lower, (0, 2)))
    assert "of another version of kappaquant; install the package again" in library.absence()


@pytest.mark.skipif(find_library("m") is None, reason="another library is needed")
def test_a_library_without_its_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_path", lambda: find_library("m"))
    assert "of another version of kappaquant; install the package again" in library.absence()


@pytest.mark.skipif(bool(library.absence()), reason=library.absence())
def test_an_instruction_set_that_is_not_here_is_named() -> None:
    with pytest.raises(UnsupportedError, match="instruction set 'mmx': this processor has "):
        library.core("mmx")
