"""Trellis codes in other layouts than that of the formats t2, t3, t4: what ``benchmarks.trellis_layouts`` measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kappaquant.formats import codec, viterbi
from kappaquant.formats.codebook import float32, symmetric
from kappaquant.formats.search import Rounding
from kappaquant.formats.trellis import INVERSE, TRELLIS, Trellis, TrellisFormat

GROUP_OF_GAUSSIANS = 128
GROUPS, ROUNDS = 1024, 40  # to train levels with
FEW = {4: Trellis((1,), (0, 2)), 8: Trellis((2,), (0, 1, 3)), 16: Trellis((2,), (0, 1, 4)), 64: TRELLIS}


@dataclass(frozen=True)
class Layout:
    """A candidate.

    Attributes:
        states: of its trellis.
        ring: path bits of a ring, at most those of a group; 0 where paths go down the rows.
    """

    states: int
    ring: int

    @property
    def code(self) -> Trellis:
        return FEW[self.states]

    @property
    def inverse(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As ``INVERSE``; the lower parity of those of few states is a path bit."""
        return INVERSE if self.code is TRELLIS else ((-self.code.lower[0],), ())


WHOLE = 256  # a ring of the group, whatever its size
LAYOUTS = {
    "t": Layout(64, WHOLE), "16 states": Layout(16, WHOLE), "8 states": Layout(8, WHOLE), "4 states": Layout(4, WHOLE),
    "ring32": Layout(64, 32), "ring32, 16 states": Layout(16, 32), "ring32, 8 states": Layout(8, 32),
    "rows": Layout(64, 0), "rows, 4 states": Layout(4, 0),
}  # fmt: skip


class Candidate(TrellisFormat):
    """A trellis format of another trellis, to be measured and not to be stored."""

    def __init__(self, bits: int, group_size: int, layout: Layout, levels: tuple[float, ...] | None = None) -> None:
        super().__init__(bits, group_size, levels or trained(bits, group_size, layout))
        self.layout, self.code = layout, layout.code
        self.id = f"x{bits}g{group_size}s{layout.states}r{layout.ring}"

    @property
    def key(self) -> str:
        return self.id

    def variant(self, codebook: tuple[float, ...], norms: str) -> Candidate:
        return type(self)(self.bits, self.group_size, self.layout, codebook)

    def __reduce__(self) -> tuple[type[Candidate], tuple[Any, ...]]:
        return type(self), (self.bits, self.group_size, self.layout, self.codebook)

    def pack_block(self, indices: Tensor) -> Tensor:
        return viterbi.pack_block(indices, self.bits, self.layout.inverse)

    def unpack_block(self, packed: Tensor) -> Tensor:
        return viterbi.unpack_block(packed, self.bits, self.code)


class Rearranged(Candidate):
    """One whose paths are no rings of whole groups; its bytes hold whole indices of levels."""

    @property
    def bytes_per_group(self) -> int:
        return self.group_size * (self.bits + 1) // 8

    def pack_block(self, indices: Tensor) -> Tensor:
        return codec.pack_block(indices, self.bits + 1)

    def unpack_block(self, packed: Tensor) -> Tensor:
        return codec.unpack_block(packed, self.bits + 1)

    def rounding(self, count: int, device: torch.device) -> Rounding:
        return CandidateRounding(self.group_size, count, device, self.codebook, self.layout)


def candidate(bits: int, group_size: int, layout: Layout) -> Candidate:
    return (Candidate if layout.ring == WHOLE else Rearranged)(bits, group_size, layout)


class CandidateRounding(viterbi.RingRounding):
    """As the package's, ring by ring; data-free codes of paths down the rows are those of whole rings, which lose about as much."""

    def __init__(
        self, group_size: int, count: int, device: torch.device, levels: tuple[float, ...], layout: Layout
    ) -> None:
        super().__init__(group_size, count, device, levels, layout.code)
        self._ring = min(layout.ring or group_size, group_size)

    def choose(self, y: Tensor) -> None:
        step = viterbi.rings_at_once(y.device)
        for start in range(0, y.shape[1], step):
            for first in range(0, len(y), self._ring):
                piece = y[first : first + self._ring, start : start + step].contiguous()
                found = viterbi.closest(piece, self._levels, self._code)
                self.codes[first : first + self._ring, start : start + step] = found
        self.centroids.copy_(self._levels[self.codes.int()])


@cache
def trained(bits: int, group_size: int, layout: Layout) -> tuple[float, ...]:
    """Levels by Lloyd's iteration, over sqrt(group_size)."""
    count, generator = 2**bits, torch.Generator().manual_seed(bits)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / (2 * count) + 0.5
    half = (math.sqrt(3) * 0.8 * torch.special.ndtri(shares)).tolist()
    sums = numbers = torch.zeros(count, dtype=torch.float64)
    for number in range(ROUNDS):
        y = torch.randn(GROUP_OF_GAUSSIANS, GROUPS, generator=generator)
        y /= y.square().sum(0).sqrt()
        levels = tuple(level / math.sqrt(GROUP_OF_GAUSSIANS) for level in symmetric(half))
        rounding = CandidateRounding(GROUP_OF_GAUSSIANS, GROUPS, y.device, levels, layout)
        rounding.choose(y)
        codes = rounding.codes.flatten().long()
        negative = codes < count
        magnitude = torch.where(negative, count - 1 - codes, codes - count)
        new = torch.zeros(count, dtype=torch.float64)
        new.index_add_(0, magnitude, torch.where(negative, -y.flatten(), y.flatten()).double())
        settled = number >= ROUNDS // 2
        sums, numbers = (
            (sums + new if settled else new),
            (numbers if settled else 0) + magnitude.bincount(minlength=count),
        )
        half = (sums / numbers * math.sqrt(GROUP_OF_GAUSSIANS)).sort()[0].tolist()
    return symmetric([float32(level / math.sqrt(group_size)) for level in half])
