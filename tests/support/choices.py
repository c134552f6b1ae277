"""Choices of a plan by bits, as tests give them."""

from __future__ import annotations

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.plan import KEPT, Choice


def choice(bits: int, group_size: int = 128, why: str = "test") -> Choice:
    """A codebook format of so many bits; 16 keeps the tensor."""
    return Choice(KEPT if bits == 16 else CodebookFormat(bits, group_size).id, why)
