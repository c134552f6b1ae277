"""FP8 weights with scales: one for a tensor, for a row (channel), or for a block of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kappaquant.errors import SourceError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import Located
from kappaquant.sources.encodings.base import EXPONENTS, PRESENTED, Encoded, Encoding, misfit, read_scales, scale_of
from kappaquant.sources.encodings.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

CODES = ("F8_E4M3", "F8_E5M2")
_SUFFIXES = (
    "_scale_inv",
    "_scale",
)  # both are multiplied by: the former is the inverse of what the weights were multiplied by
_MX_GROUP = 32


@dataclass(frozen=True)
class ScaledFp8(Encoding):
    """Weights [..., in] of one byte, and a scale for every block of ``block`` = (rows, columns) of every ``rows`` rows.

    Attributes:
        rows: after so many rows, all axes but the last flattened, blocks begin anew: one matrix of a stack, or the whole tensor.
        kind: how messages call the division into blocks.
    """

    rows: int
    block: tuple[int, int]
    kind: str

    @property
    def label(self) -> str:
        return f"fp8, {self.kind}"

    @classmethod
    def find(cls, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> Iterator[Encoded]:
        for name, info in tensors.items():
            if info.dtype in CODES and not name.endswith(_SUFFIXES):
                scale = scale_of(tensors, info, tuple(name + suffix for suffix in _SUFFIXES))
                presented = TensorInfo(name, PRESENTED, info.shape)
                yield Encoded(presented, _fitting(info, scale, scheme), {"codes": name, "scale": scale.name})

    def decode(self, parts: Mapping[str, Located], shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        import torch

        from kappaquant.files.tensors import read_elements

        width = shape[-1] if shape else 1
        across = math.ceil(width / self.block[1])
        first, last = start // width, math.ceil(stop / width)
        row = torch.arange(first, last)
        at = row // self.rows * math.ceil(self.rows / self.block[0]) + row % self.rows // self.block[0]
        begin, end = int(at[0]), int(at[-1]) + 1
        scales = read_scales(parts["scale"], begin * across, end * across).view(-1, across)[at - begin]
        values = torch.zeros(last - first, width)
        wanted = values.view(-1)[start - first * width : stop - first * width]
        wanted.copy_(read_elements(*parts["codes"], start, stop))
        values *= scales if across == 1 else scales.repeat_interleave(self.block[1], 1)[:, :width]
        return wanted


def _fitting(codes: TensorInfo, scale: TensorInfo, scheme: Scheme) -> ScaledFp8:
    """The division into blocks that a scale's shape and the scheme allow. Raises SourceError unless there is one."""
    *stack, out, width = codes.shape if len(codes.shape) > 1 else (1, *(codes.shape or (1,)))
    if not codes.numel:
        raise SourceError(
            f"{codes.name}: has shape {list(codes.shape)} and is stored as {codes.dtype}; that needs elements"
        )
    matrices = tuple(stack)
    sizes = [*scheme.blocks, *([(1, _MX_GROUP)] if scale.dtype in EXPONENTS else [])]
    grids = [(*matrices, math.ceil(out / rows), math.ceil(width / columns)) for rows, columns in sizes]
    fitting: dict[tuple[int, int], str] = {}
    for grid, (rows, columns) in zip(grids, sizes, strict=True):
        if scale.shape in (grid, (*grid[:-1], 1, grid[-1], 1)):  # the second as ModelOpt writes it
            fitting.setdefault((min(rows, out), min(columns, width)), f"blocks of {rows}x{columns}")
    if len(fitting) == 1:
        ((block, kind),) = fitting.items()
        return ScaledFp8(out, block, kind)
    if not fitting:
        if math.prod(scale.shape) == 1:
            return ScaledFp8(math.prod(stack) * out, (math.prod(stack) * out, width), "per tensor")
        if scale.shape in ((*matrices, out), (*matrices, out, 1)):
            return ScaledFp8(out, (1, width), "per channel")
        if stack and scale.shape in (matrices, (*matrices, 1), (*matrices, 1, 1)):
            return ScaledFp8(out, (out, width), "per matrix")
    blocks = "".join(f", {list(grid)} (blocks of {r}x{c})" for grid, (r, c) in zip(grids, sizes, strict=True))
    raise misfit(scale, codes, f"it may be [1], {[*matrices, out, 1]} (per channel){blocks}, and one of them alone")
