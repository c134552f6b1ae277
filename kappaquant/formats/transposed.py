"""A format along the other axis: for weights that are stored [..., in, out], as GPT-OSS' experts and GPT-2's matrices are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kappaquant.formats.base import Effort, Encoded, Format, Part
from kappaquant.formats.codebook import GroupSize, fitting
from kappaquant.formats.kinds import CODEBOOK, KINDS

if TYPE_CHECKING:
    from torch import Tensor

MARK = "t"
"""Ends the id of a transposed format."""


class Transposed(Format):
    """``rowwise`` of the transposed weight, so that groups run along the inputs all the same.

    The logical shape stays [..., in, out]; parts are those of [..., out, in]. A slice of experts is that slice of every part, but
    a row of the weight is none of theirs: the smallest piece is a whole matrix.
    """

    transposed = True

    def __init__(self, rowwise: Format) -> None:
        self._rowwise = rowwise
        self.id = rowwise.id + MARK
        self.bits, self.step, self.rotation = rowwise.bits, rowwise.step, rowwise.rotation

    @property
    def rowwise(self) -> Format:
        return self._rowwise

    @property
    def key(self) -> str:
        return self._rowwise.key + MARK

    @property
    def code_bits(self) -> int:
        return self._rowwise.code_bits

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return self._rowwise.parts(swapped(shape))

    def encode(self, weight: Tensor, effort: Effort = "best", *, name: str = "weight") -> Encoded:
        return self._rowwise.encode(weight.mT.contiguous(), effort, name=name)

    def decode(self, parts: Mapping[str, Tensor], in_features: int) -> Tensor:
        return self._rowwise.decode(parts, in_features).mT

    def rotate(self, x: Tensor) -> Tensor:
        return self._rowwise.rotate(x)

    def decode_rotated(self, parts: Mapping[str, Tensor], in_features: int) -> Tensor:
        return self._rowwise.decode_rotated(parts, in_features)

    def columns(self, start: int, stop: int) -> dict[str, slice]:
        return self._rowwise.columns(start, stop)

    def settings(self) -> dict[str, Any]:
        return self._rowwise.settings()

    def restored(self, settings: Mapping[str, Any]) -> Transposed:
        return Transposed(self._rowwise.restored(settings))

    def __reduce__(self) -> tuple[type[Transposed], tuple[Format]]:
        return Transposed, (self._rowwise,)


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the transposed matrices."""
    return (*shape[:-2], shape[-1], shape[-2])


def fitting_weight(
    bits: int, shape: tuple[int, ...], group_size: GroupSize, transposed: bool, kind: str = CODEBOOK
) -> Format:
    """``fitting`` for a weight [..., out, in], or [..., in, out] where it is ``transposed``; of another kind, with the same groups."""
    found: Format = KINDS[kind].make(bits, fitting(bits, shape[-2 if transposed else -1], group_size).group_size)
    return Transposed(found) if transposed else found
