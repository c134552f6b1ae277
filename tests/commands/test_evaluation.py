"""``kappaquant evaluate``: the files it writes, and options refused by name before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import quantized, save_source
from typer.testing import CliRunner

import kappaquant
from kappaquant.cli import app
from kappaquant.errors import OutputError, SourceError, UnsupportedError
from kappaquant.evaluate.runs import against
from kappaquant.exports.plain import dequantize


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("pair") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return quantized(source, source.parent / "q3")


def test_the_command(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "q3")
    arguments = [
        "evaluate",
        str(copy),
        "--against",
        str(source),
        "--window",
        "40",
        "--markdown",
        str(tmp_path / "t.md"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout == (tmp_path / "t.md").read_text()
    assert "against" in done.stdout
    assert (tmp_path / "tiny.logits" / "original" / "about.json").exists()
    assert "kept in" in done.stderr
    assert (copy / "evaluation.txt").exists()
    plain = dequantize(kappaquant.open_checkpoint(copy), tmp_path / "plain")
    assert not (plain / "evaluation.json").exists()  # which speaks of the packed weights
    (plain / "evaluation.json").touch()
    assert not (quantized(plain, tmp_path / "q3-again") / "evaluation.json").exists()
    again = CliRunner().invoke(app, [*arguments, "--json", "-o", str(tmp_path / "e.json")], catch_exceptions=False)
    assert json.loads(again.stdout)["settings"]["exact"]
    assert (tmp_path / "e.json").read_text() == (copy / "evaluation.json").read_text() == again.stdout


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--window", "1"], UnsupportedError, "window = 1: must be at least 2"),
        (["--window", "200"], UnsupportedError, "window = 200: .* reads at most 128 tokens"),
        (["--tokens", "0"], UnsupportedError, "tokens = 0"),
        (["--dtype", "int8"], UnsupportedError, "dtype 'int8': must be float32 or auto"),
        (["--activations", "fp4"], UnsupportedError, "activations 'fp4'"),
        (["--text", "{tmp}/absent.txt"], SourceError, "absent.txt: cannot be read"),
        (["--text", "{tmp}/latin.txt"], SourceError, "latin.txt: is not UTF-8 at byte 2"),
        (["--text", "{tmp}/empty.txt"], UnsupportedError, "empty.txt: has fewer than 2 tokens"),
        (["-o", "{tmp}/absent/e.json"], OutputError, "absent is no folder"),
        (["--markdown", "{tmp}/absent/e.md"], OutputError, "absent is no folder"),
        (["--against", "{tmp}/bare"], UnsupportedError, "bare: has no evaluation.txt; give --text FILE"),
    ],
)
def test_bad_options_are_named_before_a_model_is_loaded(
    checkpoint: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    error: Any,
    message: str,
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    (tmp_path / "empty.txt").touch()
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation.txt"))
    monkeypatch.setattr(against, "load_original", lambda *_: pytest.fail("a model was loaded"))
    given = ["--window", "40", *(option.format(tmp=tmp_path) for option in options)]
    command = ["evaluate", str(checkpoint), "--against", str(source), *given, "--logits", str(tmp_path / "logits")]
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)
