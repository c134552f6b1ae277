"""Which texts are for training and which are held out."""

from __future__ import annotations

import zlib
from typing import Literal

Split = Literal["train", "held_out"]

#: One text in this many belongs to the held-out split.
HELD_OUT_SHARE = 16


def split_of(text: str) -> Split:
    """The split a text belongs to for good, by its checksum: no seed can bring a held-out text into training."""
    return "held_out" if zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0 else "train"
