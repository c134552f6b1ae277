"""What a GPU's tiles hold of a code, by kinds of formats: a cell of as many bits, and where those lie among a lane's words.

A codebook's cell is its code; those of 4 and 5 bits are stored as sign and magnitude, for a codebook is symmetric. A trellis's is the path
bit, and above it the bits that choose a level in a subset. Beyond 2 bits levels of the upper two subsets are looked up as the negatives of
those of the lower two, so that the path gives the sign, and a table of half the levels does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kappaquant.formats import viterbi
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import SUBSETS, TRELLIS, TrellisFormat

COUNT = 32  # cells of a row that a lane holds
TRELLIS_NUMBERS = 16
"""Above which the numbers of formats are those of trellis codes (trellis.cuh)."""


@dataclass(frozen=True)
class Field:
    """Neighbouring bits of a cell.

    Attributes:
        width: bits.
        lowest: of the cell's.
        places: for each of a lane's cells the word of the plane, and the bit of it, where they begin; they may go on in the next word.
    """

    width: int
    lowest: int
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plane:
    """So many words of a row, which lie together for each row of a tile in turn."""

    words: int
    fields: tuple[Field, ...]


class Cells(ABC):
    """The cells of a format.

    Attributes:
        fmt: the format.
        number: what kernels call it (trellis.cuh).
        has_signs: whether a bit that is not part of an entry's number negates the entry.
        entries: what a kernel's table holds, by number.
        planes: in the order of a lane's words.
    """

    fmt: GroupedFormat
    number: int
    has_signs: bool
    entries: tuple[float, ...]
    planes: tuple[Plane, ...]

    @abstractmethod
    def of(self, indices: Tensor) -> Tensor:
        """uint8 [..., G * group_size] indices into the codebook -> cells."""

    @abstractmethod
    def indices(self, cells: Tensor) -> Tensor:
        """Inverse of ``of``."""


class _CodebookCells(Cells):
    def __init__(self, fmt: CodebookFormat) -> None:
        book, half = fmt.codebook, len(fmt.codebook) // 2
        self.fmt, self.number = fmt, fmt.bits
        self.has_signs = fmt.bits in (4, 5)
        self.entries = book[half - 1 :: -1] if self.has_signs else book  # of the negative half, by magnitude
        self.planes = tuple(
            Plane(width, (Field(width, lowest, _places(fmt.bits, width)),)) for width, lowest in _WIDTHS[fmt.bits]
        )

    def of(self, indices: Tensor) -> Tensor:
        if not self.has_signs:
            return indices
        half = 2 ** (self.fmt.bits - 1)
        return torch.where(indices >= half, indices, half - 1 - indices)

    def indices(self, cells: Tensor) -> Tensor:
        return self.of(cells)  # its own inverse


class _TrellisCells(Cells):
    def __init__(self, fmt: TrellisFormat) -> None:
        levels, raw = fmt.codebook, range(2 ** (fmt.bits - 1))
        self.fmt, self.number = fmt, TRELLIS_NUMBERS + fmt.bits
        self.has_signs = fmt.bits > 2
        self.entries = tuple(levels[SUBSETS * r + s] for s in (0, 1) for r in raw) if self.has_signs else levels
        path = Field(1, 0, tuple((0, 4 * i + s) for s, i in _EIGHTS))
        self.planes = (Plane(fmt.bits - 1, _raw_fields(fmt.bits)), Plane(1, (path,)))
        self._all = 2 ** (fmt.bits - 1) - 1 if self.has_signs else 0

    def of(self, indices: Tensor) -> Tensor:
        rings = self._rings(indices)
        raw = rings >> 2 ^ (rings >> 1 & 1) * self._all
        return self._from(viterbi.path_of(rings) | raw << 1, indices)

    def indices(self, cells: Tensor) -> Tensor:
        rings = self._rings(cells)
        subset = viterbi.subsets(rings & 1)
        raw = rings >> 1 ^ (subset >> 1) * self._all
        return self._from(subset | raw << 2, cells)

    def _rings(self, row: Tensor) -> Tensor:
        return row.reshape(-1, self.fmt.group_size).t()

    def _from(self, rings: Tensor, like: Tensor) -> Tensor:
        return rings.t().reshape(like.shape)


@cache
def cells(fmt: GroupedFormat) -> Cells:
    """The cells of a format that is not ``unfit``."""
    if isinstance(fmt, TrellisFormat):
        return _TrellisCells(fmt)
    assert isinstance(fmt, CodebookFormat)
    return _CodebookCells(fmt)


def unfit(fmt: Format) -> str | None:
    """Why a format has no cells, or None."""
    if isinstance(fmt, TrellisFormat):
        return None if fmt.code == TRELLIS else f"takes the trellis {TRELLIS}, not {fmt.code}"
    return None if isinstance(fmt, CodebookFormat) else f"takes codebooks and trellis codes, not {fmt.id}"


_EIGHTS = tuple(divmod(c, 8) for c in range(COUNT))
"""Which eight cells each is looked up with, and its nibble there."""

# (width, lowest bit of the code) of each plane of a codebook's codes
_WIDTHS: dict[int, Sequence[tuple[int, int]]] = {
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((6, 0),),
    7: ((7, 0),),
    8: ((8, 0),),
}


def _places(bits: int, width: int) -> tuple[tuple[int, int], ...]:
    """Where ``decode.cuh`` reads such a plane's part of a code."""
    found = []
    for c, (s, i) in enumerate(_EIGHTS):
        if width > 4:
            found.append(divmod(width * c, 32))
        elif width == 4:
            found.append((s, 4 * i))
        elif width == 2:
            found.append((s // 2, 4 * i + 2 * (s % 2)))
        elif bits == 5:
            found.append((0, 4 * i + s))
        else:
            found.append((0, 4 * i + (2, 1, 3, 0)[s]))
    return tuple(found)


def _raw_fields(bits: int) -> tuple[Field, ...]:
    """Where ``decode.cuh`` reads the bits that choose a level in a subset."""
    if bits == 2:
        return (Field(1, 1, tuple((0, 4 * i + s) for s, i in _EIGHTS)),)
    if bits == 3:
        return (Field(2, 1, tuple((s // 2, 4 * i + 2 * (s % 2)) for s, i in _EIGHTS)),)
    # the last eight cells' in what the nibbles of the others leave
    return tuple(
        Field(1, 1 + bit, tuple((s, 4 * i + bit) if s < 3 else (bit, 4 * i + 3) for s, i in _EIGHTS))
        for bit in range(3)
    )
