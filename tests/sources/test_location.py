"""Folders and Hub ids, wherever sources and checkpoints are taken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_checkpoints
from builders import quantize, write_source
from huggingface_hub import constants
from tiny_models import character_tokenizer, save_tiny
from typer.testing import CliRunner

import kappaquant
from kappaquant import FormatError, SourceError
from kappaquant.checkpoints.open import open_weights
from kappaquant.cli import build
from kappaquant.engines.serve import choose
from kappaquant.sources.location import Location, cached, local_file, locate

REPO, COMMIT, OTHER = "owner/tiny", "0123456789abcdef0123456789abcdef01234567", "f" * 40


def put_into_cache(cache: Path, folder: Path, repo: str = REPO, commit: str = COMMIT, ref: str = "main") -> Path:
    """A folder as the Hub's client leaves it in its cache: a snapshot of links to blobs; the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = home / "blobs" / f"{commit}{number}"
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_what_is_meant(tmp_path: Path) -> None:
    assert locate(tmp_path) == Location(tmp_path, None, None)
    assert locate("owner/name") == Location(None, "owner/name", None)
    assert locate("owner/name@v1/x") == Location(None, "owner/name", "v1/x")
    assert locate("owner/name", "main") == locate("owner/name@main", "main") == Location(None, "owner/name", "main")
    (tmp_path / "file").write_text("")
    for place, revision, message in [
        ("owner/name@a", "b", "names the revision a, --revision b"),
        (tmp_path, "main", "--revision main applies to a Hub id"),
        (tmp_path / "file", None, "is a file"),
        ("name", None, "no such folder, and not a Hub id of the form owner/name or owner/name@revision"),
        ("a/b/c", None, "not a Hub id"),
        ("a/b@", None, "not a Hub id"),
    ]:
        with pytest.raises(FormatError, match=message):
            locate(place, revision, FormatError)


def test_a_folder_of_the_cache_goes_by_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_into_cache(tmp_path / "hub", write_source(tmp_path / "s", shards=2))
    assert cached(snapshot) == (REPO, COMMIT)
    assert cached(tmp_path) is None
    assert cached(snapshot.with_name("main")) is None
    source = kappaquant.open_source(snapshot)
    assert (source.name, source.revision, source.folder) == (REPO, COMMIT, snapshot)
    made = quantize(snapshot, tmp_path / "out")
    assert '"source": {\n  "model": "owner/tiny",\n  "revision": "0123' in (made.path / "kappaquant.json").read_text()
    monkeypatch.chdir(snapshot)
    assert kappaquant.open_source(".").label == REPO


def test_offline_the_cache_is_the_hub(cache: Path, tmp_path: Path) -> None:
    put_into_cache(cache, write_source(tmp_path / "a"))
    put_into_cache(cache, write_source(tmp_path / "b", shards=2), commit=OTHER, ref="branch")
    for stream in (True, False):
        assert kappaquant.open_source(REPO, stream=stream).revision == COMMIT
        assert kappaquant.open_source(f"{REPO}@branch", stream=stream).revision == OTHER
        assert kappaquant.open_source(REPO, OTHER, stream=stream).revision == OTHER
    with pytest.raises(SourceError, match="owner/absent: no such folder here, and from the Hub"):
        kappaquant.open_source("owner/absent")
    with pytest.raises(FormatError, match="owner/absent: no such folder here, and from the Hub"):
        kappaquant.open_checkpoint("owner/absent")
    with pytest.raises(SourceError, match=f"{REPO}: no such folder here, and from the Hub"):
        kappaquant.open_source(f"{REPO}@gone")


def test_offline_a_shard_that_was_never_fetched_is_named(cache: Path, tmp_path: Path) -> None:
    snapshot = put_into_cache(cache, write_source(tmp_path / "a", shards=2))
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=f"{REPO}/model-00002-of-00002.safetensors: named by .* but missing"):
        kappaquant.open_source(REPO)


def test_a_checkpoint_on_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a checkpoint takes its id: in Python, and every command."""
    source = save_tiny("llama", tmp_path / "source")
    character_tokenizer().save_pretrained(source)
    put_into_cache(cache, source, "owner/original", OTHER)
    snapshot = put_into_cache(cache, tiny_checkpoints.quantize(source, tmp_path / "packed"))
    opened = kappaquant.open_checkpoint(REPO)
    assert (opened.path, opened.name, opened.revision) == (snapshot, REPO, COMMIT)
    assert open_weights(f"{REPO}@main").label == str(snapshot)
    assert open_weights("owner/original").label == "owner/original"
    assert open_weights(snapshot).identity() == opened.identity()
    model, tokenizer = kappaquant.load(f"{REPO}@{COMMIT}")
    assert tokenizer is not None
    assert model.config.model_type == "llama"

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(build(), list(arguments))
        assert done.exit_code == code, done.output
        return done.output if code == 0 else str(done.exception)

    monkeypatch.setattr("kappaquant.engines.serve.find_spec", lambda name: name)  # as if all were installed
    assert str(snapshot) in choose(REPO, "transformers").command
    run("verify", REPO)
    run("inspect", f"{REPO}@main")
    run("dequantize", REPO, "-o", str(tmp_path / "plain"))
    run("generate", REPO, "The", "--max-new-tokens", "2", "--device", "cpu")
    run("bench", REPO, "--against", "owner/original", "--context", "4", "--steps", "2", "--device", "cpu")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    measure = (
        "evaluate",
        REPO,
        "--against",
        "owner/original",
        "--text",
        str(text),
        "--window",
        "32",
        "--device",
        "cpu",
    )
    assert "lies in the Hub's cache, where nothing is written; give -o FILE" in run(*measure, code=1)
    report = tmp_path / "evaluation.json"
    run(*measure, "--no-noise-floor", "-o", str(report))
    assert f'"{REPO}"' in report.read_text()
    run("compare", str(report), "--against", "owner/original")
    (snapshot / "evaluation.json").symlink_to(report)
    rows = json.loads(run("compare", f"{REPO}@main", str(report), "--json"))["rows"]
    assert [row["name"] for row in rows] == [f"{REPO}@main", str(report)]
    assert "give -o FILE for README.md" in run("card", REPO, code=1)
    run("card", REPO, "-o", str(tmp_path / "card.md"), "--report", str(report))
    assert not (snapshot / "README.md").exists()


def test_of_a_repository_one_file_is_fetched(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "evaluation.json").write_text("{}")
    snapshot = put_into_cache(cache, tmp_path / "only")
    assert local_file(REPO, "evaluation.json") == snapshot / "evaluation.json"
    assert local_file(tmp_path, "evaluation.json") == tmp_path / "evaluation.json"
