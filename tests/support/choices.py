"""Choices of a plan by bits, as tests give them."""

from __future__ import annotations

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.plan import KEPT, Choice


def choice(bits: int | str, group_size: int = 128, why: str = "test") -> Choice:
    """A codebook format of so many bits, or the one of an id; 16 keeps the tensor."""
    if isinstance(bits, str):
        return Choice(bits, why)
    return Choice(KEPT if bits == 16 else CodebookFormat(bits, group_size).id, why)
