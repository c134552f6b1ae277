"""FP4 weights, two in a byte, with a scale for every group of a row: NVFP4 and MXFP4 of ModelOpt and compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kappaquant.errors import SourceError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import Located
from kappaquant.sources.encodings.base import (
    EXPONENTS,
    PRESENTED,
    Encoded,
    Encoding,
    check_scales,
    misfit,
    read_scales,
    scale_of,
)
from kappaquant.sources.encodings.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of the eight positive codes; the fourth bit is the sign."""
_PACKED = "_packed"  # of compressed-tensors; ModelOpt's codes have the name of the weight


@dataclass(frozen=True)
class GroupedFp4(Encoding):
    """Codes [..., in / 2] of two weights a byte, the first in the low bits, and scales [..., in / group].

    Attributes:
        group: weights of a row that share a scale: 16 with scales in FP8 (NVFP4), 32 with exponents (MXFP4).
        divides: NVFP4's scales are divided by the one of the whole tensor (compressed-tensors), not multiplied (ModelOpt).
    """

    group: int
    divides: bool

    @property
    def label(self) -> str:
        return "nvfp4" if self.group == 16 else "mxfp4"

    @classmethod
    def find(cls, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> Iterator[Encoded]:
        for name, info in tensors.items():
            base = name.removesuffix(_PACKED)
            scaled = base + "_scale" in tensors or base.endswith(".weight")
            if info.dtype == "U8" and scaled and not name.endswith("_scale"):
                yield _encoded(tensors, info, base)

    def decode(self, parts: Mapping[str, Located], shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        from kappaquant.files.tensors import read_elements

        first, last = start // self.group, math.ceil(stop / self.group)  # groups: rows are whole ones
        scales = read_scales(parts["scale"], first, last)
        if "global" in parts:
            scales = self._global(scales, parts["global"], first, math.prod(shape[-2:]) // self.group)
        codes = read_elements(*parts["codes"], first * self.group // 2, last * self.group // 2)
        values = unpack(codes).view(-1, self.group) * scales[:, None]
        return values.view(-1)[start - first * self.group : stop - first * self.group]

    def _global(self, scales: Tensor, located: Located, first: int, groups: int) -> Tensor:
        """Scales of the groups from ``first`` on with the tensor's, or, of a stack, each matrix's ``groups``."""
        import torch

        path, stored = located
        over = read_scales(located, 0, stored.info.numel).view(-1)
        if len(over) > 1:
            over = over[torch.arange(first, first + len(scales)) // groups]
        scales = scales / over if self.divides else scales * over
        check_scales(scales, stored.info.name, path.name)
        return scales


def _encoded(tensors: Mapping[str, TensorInfo], codes: TensorInfo, base: str) -> Encoded:
    scale = scale_of(tensors, codes, (base + "_scale",))
    parts = {"codes": codes.name, "scale": scale.name}
    if scale.dtype not in ("F8_E4M3", *EXPONENTS):
        raise SourceError(
            f"{codes.name}: is packed into bytes, with a scale of dtype {scale.dtype}; of packed weights those are read whose scales "
            f"are F8_E4M3 (NVFP4) or {' or '.join(EXPONENTS)} (MXFP4)"
        )
    group = 32 if scale.dtype in EXPONENTS else 16
    if not codes.shape or codes.shape[-1] * 2 % group or not codes.numel:
        raise SourceError(
            f"{codes.name}: has shape {list(codes.shape)}; rows of whole groups of {group} weights are needed"
        )
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    wanted = (*shape[:-1], shape[-1] // group)
    if scale.shape != wanted:
        raise misfit(scale, codes, f"it must be {list(wanted)} (groups of {group})")
    divides = codes.name != base
    if group == 16:
        name = base + ("_global_scale" if divides else "_scale_2")
        over = scale_of(tensors, codes, (name,))
        if math.prod(over.shape) != 1 and over.shape not in (shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1)):
            raise misfit(over, codes, "it must hold one number, or one for each matrix")
        parts["global"] = name
    return Encoded(TensorInfo(base, PRESENTED, shape), GroupedFp4(group, divides), parts)


def unpack(codes: Tensor) -> Tensor:
    """The values of codes, two a byte, the first in the low bits: uint8 [...] -> float32 [..., 2]."""
    return _pairs()[codes.int()]


@cache
def _pairs() -> Tensor:
    """The two values of each byte [256, 2]."""
    import torch

    values = torch.tensor([sign * value for sign in (1.0, -1.0) for value in E2M1])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
