"""Trellis formats of fewer states than those that are stored."""

from __future__ import annotations

from torch import Tensor

from kappaquant.formats import viterbi
from kappaquant.formats.trellis import Trellis, TrellisFormat


class Few(TrellisFormat):
    """Of 4 states. The lower parity is a path bit of before."""

    code = Trellis((1,), (0, 2))

    @property
    def key(self) -> str:
        return f"{super().key}+{self.code.states} states"

    def pack_block(self, indices: Tensor) -> Tensor:
        return viterbi.pack_block(indices, self.bits, ((-self.code.lower[0],), ()))

    def unpack_block(self, packed: Tensor) -> Tensor:
        return viterbi.unpack_block(packed, self.bits, self.code)


class Eight(Few):
    code = Trellis((2,), (0, 1, 3))


class Sixteen(Few):
    code = Trellis((2,), (0, 1, 4))


class ThirtyTwo(Few):
    code = Trellis((2,), (0, 1, 2, 5))


OTHERS = (Few, Eight, Sixteen, ThirtyTwo)
