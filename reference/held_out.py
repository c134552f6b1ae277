"""The held-out text that ``kappaquant evaluate`` reads by default when it is measured against the reference model.

python -m reference.held_out
"""

from __future__ import annotations

from pathlib import Path

from reference.build import END
from reference.text import problems, scenes

PATH = Path(__file__).parent / "model" / "evaluation.txt"
_PAIRS = 60
_SEED = 5  # of no other measurement here


def held_out_text() -> str:
    """Worked problems and scenes in turn, each ended as in training rows; about 40 kB."""
    told = zip(problems(_SEED, _PAIRS), scenes(_SEED, _PAIRS), strict=True)
    return "".join(p.prompt + p.worked + END + scene + END for p, scene in told)


def main() -> None:
    PATH.write_text(held_out_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
