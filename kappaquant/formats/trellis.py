"""Trellis formats as data: parities, levels, names on disk. No torch until something is encoded; docs/format.md is normative.

Of the bits of a weight one belongs to a path, a ring of ``group_size`` bits. Two parities of the path before and at a weight choose one
of four subsets of the levels, and the other bits a level in it: trellis coded quantization (Marcellin & Fischer, 1990) with Ungerboeck's
subsets, closed to a ring (tail-biting) so that a group says all there is to know of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kappaquant.errors import PlanError
from kappaquant.formats.codebook import GroupedFormat, codebook_data, float32, symmetric
from kappaquant.formats.signs import GROUP_SIZES, check_group_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kappaquant.formats.search import Rounding

TRELLIS_BITS = (2, 3, 4)
SUBSETS = 4


@dataclass(frozen=True)
class Trellis:
    """Which subset a path leaves a weight.

    Attributes:
        lower, upper: how many weights back the path bits lie whose parity is that bit of the subset's number; upper has the furthest.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @property
    def memory(self) -> int:
        """Path bits before a weight that its subset depends on."""
        return max(self.upper)

    @property
    def states(self) -> int:
        return 1 << self.memory


TRELLIS = Trellis((2, 4, 5), (0, 1, 6))
"""That of all trellis formats."""
INVERSE = ((1, 3), (0, 1, 2))
"""How many weights back the lower and upper bits of subsets' numbers lie whose parity is the path bit: what gives the path again."""


class TrellisFormat(GroupedFormat):
    """Groups of rotated weights on a ring of path bits, which leaves each weight half of 2**(bits + 1) levels.

    Args:
        levels: ascending, float32 values symmetric about 0; level i is of subset i mod 4. By default those trained for a unit
            Gaussian over sqrt(group_size).
        norms: dtype of the norms, "F16" or "F32".

    Attributes:
        code: its trellis.

    Raises:
        PlanError: bits or group size out of range.
    """

    code = TRELLIS

    def __init__(self, bits: int, group_size: int, levels: tuple[float, ...] | None = None, norms: str = "F16") -> None:
        if isinstance(bits, bool) or bits not in TRELLIS_BITS:
            raise PlanError(f"bits = {bits!r}: a trellis code has {', '.join(map(str, TRELLIS_BITS))} bits")
        check_group_size(group_size)
        usual = gaussian_levels(bits, group_size)
        super().__init__(f"t{bits}g{group_size}", bits, group_size, usual if levels is None else levels, usual, norms)

    def variant(self, codebook: tuple[float, ...], norms: str) -> TrellisFormat:
        return TrellisFormat(self.bits, self.group_size, codebook, norms)

    def pack_block(self, indices: Tensor) -> Tensor:
        from kappaquant.formats import viterbi

        return viterbi.pack_block(indices, self.bits)

    def unpack_block(self, packed: Tensor) -> Tensor:
        from kappaquant.formats import viterbi

        return viterbi.unpack_block(packed, self.bits)

    def rounding(self, count: int, device: torch.device) -> Rounding:
        from kappaquant.formats.viterbi import RingRounding

        return RingRounding(self.group_size, count, device, self.codebook, self.code)


@cache
def gaussian_levels(bits: int, group_size: int) -> tuple[float, ...]:
    """The 2**(bits + 1) levels, ascending, as float32 values: those of ``codebooks.json`` over sqrt(group_size)."""
    half = codebook_data()["trellis"][str(bits)]
    return symmetric([float32(level / math.sqrt(group_size)) for level in half])


TRELLIS_FORMATS: dict[str, TrellisFormat] = {
    fmt.id: fmt for fmt in (TrellisFormat(bits, group_size) for bits in TRELLIS_BITS for group_size in GROUP_SIZES)
}
