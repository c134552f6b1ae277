"""Where tests find files: in the repository, and beside it where they are there."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "tests" / "data" / "tq3_native"
BESIDE = ROOT.parent / "shared"
GOLDEN = BESIDE / "golden" / "tq3_native"
