"""Which task to ask, how, and the files its questions and shots come from; what is wrong is said before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from kappaquant.errors import SourceError, UnsupportedError

STORIES = "arithmetic_stories"  # of the reference model; lm-eval has another "arithmetic"
_FIELDS = ("question", "answer")
_ANSWER = re.compile(r"#### -?[0-9.,]")


@dataclass(frozen=True)
class Preset:
    """A protocol over a file of questions: first ``questions`` of them (None for all), shots, tokens of an answer at most.

    Attributes:
        published: made to be compared with published numbers, so that nothing of it may be changed.
    """

    questions: int | None
    shots: int
    max_tokens: int
    published: bool = False


# gsm8k-200: the protocol that the published TurboQuant checkpoints of Qwen3.6-35B-A3B were measured by
PRESETS = {
    "gsm8k": Preset(None, 5, 1024),
    "gsm8k-200": Preset(200, 5, 1024, published=True),
    STORIES: Preset(None, 0, 72),  # worked answers stay under 60 tokens
}


@dataclass(frozen=True)
class TaskSpec:
    """A task as it is asked for.

    Attributes:
        name: one of PRESETS with a file, else a task, group or tag of lm-eval.
        file: questions, one JSON object a line with "question" and "answer", the latter ending in "#### number"; None for
            lm-eval's own data.
        shots_from: worked examples in the same form.
        questions: the first so many, None for all; shots, max_tokens: None as lm-eval's task has it.
        chat_template: prompts go through the tokenizer's chat template; batch_size: prompts that run together.
    """

    name: str
    file: Path | None = None
    shots_from: Path | None = None
    questions: int | None = None
    shots: int | None = None
    max_tokens: int | None = None
    chat_template: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        for field, least in (("questions", 1), ("shots", 0), ("max_tokens", 1), ("batch_size", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise UnsupportedError(f"task {self.name}: {field} = {value}, must be at least {least}")


def parse_task(
    text: str,
    original: Path,
    *,
    shots_from: Path | None = None,
    questions: int | None = None,
    shots: int | None = None,
    max_tokens: int | None = None,
    chat_template: bool = False,
    batch_size: int = 16,
) -> TaskSpec:
    """``NAME=FILE`` or ``NAME`` of the command line, completed by its preset.

    Args:
        original: folder in which ``arithmetic_stories`` looks for its file if none is named.
        questions, shots, max_tokens: instead of the preset's.

    Raises:
        UnsupportedError: no such preset, a published one that is to be changed, or shots without a file of them.
    """
    name, _, given = text.partition("=")
    file = Path(given) if given else None
    if name == STORIES and file is None:
        file = original / f"{STORIES}.jsonl"
    if file is None:
        if name == "gsm8k-200":
            raise UnsupportedError("task gsm8k-200: is asked from files; give --task gsm8k-200=FILE --shots-from FILE")
        return TaskSpec(name, None, None, questions, shots, max_tokens, chat_template, batch_size)
    if name not in PRESETS:
        raise UnsupportedError(
            f"task {name!r}: a file of questions is for {', '.join(PRESETS)}; other tasks of lm-eval are given by name alone"
        )
    preset = PRESETS[name]
    if preset.published and any(value is not None for value in (questions, shots, max_tokens)):
        raise UnsupportedError(
            f"task {name}: is a published protocol of {preset.questions} questions, {preset.shots} shots and at most "
            f"{preset.max_tokens} tokens; give gsm8k={file} to change it"
        )
    shots = preset.shots if shots is None else shots
    if shots and shots_from is None:
        raise UnsupportedError(
            f"task {name}: its {shots} shots need worked examples; give --shots-from FILE, or --shots 0"
        )
    return TaskSpec(
        name, file, shots_from if shots else None, preset.questions if questions is None else questions, shots,
        preset.max_tokens if max_tokens is None else max_tokens, chat_template, batch_size,
    )  # fmt: skip


def read_questions(path: Path) -> list[dict[str, str]]:
    """Every question of a file, with its worked answer.

    Raises:
        SourceError: it cannot be read, is empty, or a line is not as it should be; named by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as problem:
        raise SourceError(f"{path}: cannot be read ({problem.strerror}); questions are a file of JSON lines") from None
    except UnicodeDecodeError as problem:
        raise SourceError(f"{path}: is not UTF-8 at byte {problem.start}; questions are a file of JSON lines") from None
    found = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise SourceError(f"{path}: has no questions; expected one JSON object a line")
    return found


def _question(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        content = json.loads(line)
    except ValueError as problem:
        raise SourceError(f"{path}:{number}: is not JSON ({problem})") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in _FIELDS):
        raise SourceError(f"{path}:{number}: expected an object with the strings 'question' and 'answer'")
    if not _ANSWER.search(content["answer"]):
        raise SourceError(f"{path}:{number}: its answer has no '#### ' and number, which extraction looks for")
    return {key: content[key] for key in _FIELDS}


def read_task(spec: TaskSpec) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(questions, shots) of a task that has a file; the first ones of each.

    Raises:
        SourceError: as ``read_questions``, or there are fewer than asked for.
        UnsupportedError: a shot is one of the questions.
    """
    assert spec.file
    asked = _first(spec.file, spec.questions)
    shown = _first(spec.shots_from, spec.shots) if spec.shots_from else []
    known = {shot["question"] for shot in shown}
    if both := next((q["question"] for q in asked if q["question"] in known), None):
        raise UnsupportedError(
            f"{spec.shots_from}: shows the answer to a question of {spec.file} ({both[:50]!r}…); take shots from training data"
        )
    return asked, shown


def _first(path: Path, count: int | None) -> list[dict[str, str]]:
    found = read_questions(path)
    if count is not None and len(found) < count:
        raise SourceError(f"{path}: has {len(found)} questions, asked for are {count}")
    return found[:count]
