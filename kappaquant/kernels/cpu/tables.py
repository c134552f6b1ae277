"""What the native core is told of the values that codes stand for: made once for each codebook or trellis code."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from kappaquant.formats import search, viterbi
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.trellis import Trellis, TrellisFormat

_CPU = torch.device("cpu")
MOST_STATES = 64
"""As in encode.h."""


@dataclass(frozen=True)
class Tables:
    """Of codebooks, or of a trellis code.

    Attributes:
        books: float32, codebooks one after another, or levels.
        magnitudes: float32, of the first codebook the centroids by cell; empty for a trellis code.
        scales: float32 [trials], those that are tried.
        steps: float32 [trials], their cells for each unit of magnitude; of a trellis code their squares.
        subsets: uint8 [states / 2], of a trellis code the subset of the step from each state whose oldest bit is 0, by path bit 0.
    """

    books: Tensor
    magnitudes: Tensor
    scales: Tensor
    steps: Tensor
    subsets: Tensor

    @property
    def told(self) -> dict[str, int]:
        """What ``Encoding`` is told of them."""
        addresses = {field.name: getattr(self, field.name).data_ptr() for field in fields(self)}
        return {**addresses, "trials": len(self.scales), "states": 2 * len(self.subsets)}


def tables(fmt: GroupedFormat, tried: bool) -> Tables:
    """Those of a format; ``tried``: with the scales that effort "best" tries."""
    if isinstance(fmt, TrellisFormat):
        return _of_trellis(fmt.codebook, fmt.code, viterbi.SCALES if tried else ())
    return of_codebooks((fmt.codebook,), search.SCALES if tried else ())


@cache
def of_codebooks(books: tuple[tuple[float, ...], ...], scales: tuple[float, ...] = ()) -> Tables:
    """Those of codebooks of one group size."""
    table = search.nearest(books[0], _CPU)
    every = torch.tensor([value for book in books for value in book], dtype=torch.float32)
    steps = torch.tensor([scale * table.fineness for scale in scales], dtype=torch.float32)
    return Tables(
        every, table.magnitude, torch.tensor(scales, dtype=torch.float32), steps, torch.empty(0, dtype=torch.uint8)
    )


@cache
def _of_trellis(levels: tuple[float, ...], code: Trellis, scales: tuple[float, ...]) -> Tables:
    low, _ = viterbi.branches(code, _CPU)
    books, magnitudes, tried, squares = (
        torch.tensor(values, dtype=torch.float32)
        for values in (levels, (), scales, [scale * scale for scale in scales])
    )
    return Tables(books, magnitudes, tried, squares, low[::2].to(torch.uint8))


def unfit(code: Trellis) -> str | None:
    """Why the core's searches do not know a trellis, or None."""
    if not 4 <= code.states <= MOST_STATES:
        return f"searches trellises of 4 to {MOST_STATES} states, not of {code.states}"
    ends = {0, code.memory}
    if ends & set(code.lower) or not ends <= set(code.upper):
        return f"searches trellises whose upper parity alone counts the newest and the oldest bit, not {code}"
    return None
