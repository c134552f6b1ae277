"""Where tests find files: in the repository, and beside it where they are there."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BESIDE = ROOT.parent / "shared"
GOLDEN = BESIDE / "golden" / "tq3_native"
