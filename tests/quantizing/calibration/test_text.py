"""Calibration text: windows of tokens from text and messages, and files that are neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kappaquant.errors import PlanError
from kappaquant.quantizing.calibration.text import calibration
from reference.evaluate import MODEL


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_windows_of_a_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Mara walks to the mill and back. " * 40)
    ids = tokenizer(path.read_text())["input_ids"]
    made = calibration(path, tokenizer, tokens=100, window=32)
    assert made.windows.tolist() == [ids[32 * row : 32 * (row + 1)] for row in range(3)]
    assert made.record["tokens"] == 96
    assert made.record["file"] == "text.txt"
    again = calibration(path, tokenizer, tokens=64, window=32)
    assert again.record["tokens_sha256"] != made.record["tokens_sha256"]


def test_a_text_shorter_than_a_window_is_one_window(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Mara walks to the mill.")
    assert calibration(path, tokenizer).windows.tolist() == [tokenizer(path.read_text())["input_ids"]]


def test_lines_of_text_and_of_messages(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "How far?"}]
    path.write_text(f"{json.dumps({'text': 'Mara walks.'})}\n\n{json.dumps({'messages': messages})}\n")
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = [*tokenizer("Mara walks.")["input_ids"], *tokenizer(chat)["input_ids"]]
    assert calibration(path, tokenizer).windows.tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "gives 0 tokens"),
        ("one.txt", "1111111", "1 of them different"),
        ("rows.jsonl", '{"words": []}\n', 'rows.jsonl:1: must be a JSON object with a "text" or "messages"'),
        ("rows.jsonl", '{"text": "a"}\nnot json\n', "rows.jsonl:2: must be a JSON object"),
    ],
)
def test_files_that_cannot_calibrate(tokenizer: Any, tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(PlanError, match=message):
        calibration(path, tokenizer)


def test_no_file_other_bytes_and_too_few_tokens(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.txt: no such file"):
        calibration(tmp_path / "nowhere.txt", tokenizer)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PlanError, match=r"bytes\.txt: cannot be read as UTF-8 text"):
        calibration(tmp_path / "bytes.txt", tokenizer)
    with pytest.raises(PlanError, match="--calibration-tokens 1: must be 2 or more"):
        calibration(tmp_path / "bytes.txt", tokenizer, tokens=1)
