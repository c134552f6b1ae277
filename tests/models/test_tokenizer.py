"""Tokenizers are read as files, never by code that comes with them, and broken ones are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import character_tokenizer

from kappaquant.errors import SourceError, UnsupportedError
from kappaquant.models.skeleton import load_config
from kappaquant.models.tokenizer import read_tokenizer, templated

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    character_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(CODE)
    return tmp_path


def test_a_whole_one_is_read(folder: Path) -> None:
    assert len(read_tokenizer(folder)("hello")["input_ids"]) > 3


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE", "vocab": 3}}', "\x00"])
def test_broken_files_are_one_line(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"has no tokenizer that transformers can load by itself \(.+\)") as problem:
        read_tokenizer(folder)
    assert str(folder) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_code_of_a_repository_is_not_run_and_nobody_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(SourceError, match="by itself"):
        read_tokenizer(folder)
    own = {"model_type": "own_model", "auto_map": {"AutoConfig": "own.OwnConfig"}, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(own))
    for location in (folder, own):
        with pytest.raises(UnsupportedError, match="transformers"):
            load_config(location)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in %}", "Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "list"),
    ],
)
def test_a_chat_template_that_breaks(template: str, said: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        UnsupportedError, match=f"its chat template makes nothing of this conversation .*{said}"
    ) as caught:
        templated(tokenizer, [{"role": "user", "content": "hi"}], tokenize=False)
    assert "\n" not in str(caught.value)
