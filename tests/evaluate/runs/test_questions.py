"""Questions and presets of tasks: files refused by line, shots that give nothing away, published protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kappaquant.errors import SourceError, UnsupportedError
from kappaquant.evaluate.runs.questions import TaskSpec, parse_task, read_questions, read_task


def line(question: str = "How many?", answer: str = "1+1=2. #### 2") -> str:
    return json.dumps({"question": question, "answer": answer}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no questions"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (line().encode() + b"{", r"q\.jsonl:2: is not JSON"),
        (b"[]\n", r"q\.jsonl:1: expected an object"),
        (b'{"question": "a"}\n', r"q\.jsonl:1: expected an object with the strings"),
        (line(answer="two").encode(), r"q\.jsonl:1: its answer has no '#### '"),
    ],
)
def test_broken_questions_are_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_questions(path)


def test_questions_and_shots(tmp_path: Path) -> None:
    asked, shown = tmp_path / "q.jsonl", tmp_path / "s.jsonl"
    asked.write_text("".join(line(f"q{i}") for i in range(4)))
    shown.write_text(line("s0") + line("s1") + line("q1"))
    with pytest.raises(SourceError, match="cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
    found, shots = read_task(TaskSpec("gsm8k", asked, shown, questions=3, shots=2))
    assert [q["question"] for q in found] == ["q0", "q1", "q2"]
    assert [q["question"] for q in shots] == ["s0", "s1"]
    with pytest.raises(SourceError, match="has 4 questions, asked for are 5"):
        read_task(TaskSpec("gsm8k", asked, questions=5))
    with pytest.raises(UnsupportedError, match=r"s\.jsonl: shows the answer to a question of .*'q1'"):
        read_task(TaskSpec("gsm8k", asked, shown, shots=3))


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("gsm8k-200", {}, "give --task gsm8k-200=FILE"),
        ("other=q.jsonl", {}, "task 'other': a file of questions is for gsm8k"),
        ("gsm8k=q.jsonl", {}, "its 5 shots need worked examples"),
        (
            "gsm8k-200=q.jsonl",
            {"shots": 3},
            "is a published protocol of 200 questions, 5 shots and at most 1024 tokens",
        ),
        ("gsm8k=q.jsonl", {"shots": 0, "questions": 0}, "questions = 0, must be at least 1"),
        ("acc", {"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_tasks_that_cannot_be(text: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_task(text, Path(), **more)


def test_presets() -> None:
    published = parse_task("gsm8k-200=q.jsonl", Path(), shots_from=Path("s.jsonl"))
    assert (published.questions, published.shots, published.max_tokens) == (200, 5, 1024)
    assert parse_task("arithmetic_stories", Path("model")).file == Path("model/arithmetic_stories.jsonl")
    assert parse_task("gsm8k=q", Path(), shots=0, shots_from=Path("s")).shots_from is None
