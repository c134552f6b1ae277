"""What ``kappaquant evaluate`` reads and asks by default when it is measured against the reference model; all of it held out.

python -m reference.held_out
"""

from __future__ import annotations

import json
from pathlib import Path

from reference.build import END
from reference.text import format_prompt, problems, scenes

PATH = Path(__file__).parent / "model" / "evaluation.txt"
QUESTIONS = PATH.with_name("arithmetic_stories.jsonl")
_PAIRS = 60
_SEED = 5  # of no other measurement here
_STORIES = 300


def held_out_text() -> str:
    """Worked problems and scenes in turn, each ended as in training rows; about 40 kB."""
    told = zip(problems(_SEED, _PAIRS), scenes(_SEED, _PAIRS), strict=True)
    return "".join(p.prompt + p.worked + END + scene + END for p, scene in told)


def held_out_questions() -> str:
    """Arithmetic stories as JSON lines: the question in plain words, and the worked answer, which ends in "#### number"."""
    before, after = format_prompt("|").split("|")
    return "".join(
        json.dumps({"question": p.prompt.removeprefix(before).removesuffix(after), "answer": p.worked.strip()}) + "\n"
        for p in problems(_SEED + 1, _STORIES)
    )


def main() -> None:
    PATH.write_text(held_out_text(), encoding="utf-8")
    QUESTIONS.write_text(held_out_questions(), encoding="utf-8")


if __name__ == "__main__":
    main()
