"""MXFP4 experts of gpt-oss: blocks of 32 weights along the input, the matrices of a layer's experts stacked and transposed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kappaquant.errors import SourceError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.entry import Located
from kappaquant.sources.encodings.base import EXPONENTS, PRESENTED, Encoded, Encoding, misfit, read_scales, scale_of
from kappaquant.sources.encodings.fp4 import unpack
from kappaquant.sources.encodings.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

_CODES, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block, of twice as many weights
_AT_ONCE = 1 << 22  # bytes of codes that are held at once


@dataclass(frozen=True)
class Mxfp4Experts(Encoding):
    """Codes [E, out, blocks, 16] and exponents [E, out, blocks] of the tensor [E, in, out] that the model multiplies by from the right."""

    @property
    def label(self) -> str:
        return "mxfp4"

    @classmethod
    def find(cls, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> Iterator[Encoded]:
        for name, info in tensors.items():
            if name.endswith(_CODES) and info.dtype == "U8":
                base = name.removesuffix(_CODES)
                scale = scale_of(tensors, info, (base + _SCALES,))
                if len(info.shape) != 4 or info.shape[-1] != _BYTES or not info.numel:
                    raise SourceError(
                        f"{name}: has shape {list(info.shape)}; MXFP4 experts are [experts, out, blocks, {_BYTES}]"
                    )
                if scale.shape != info.shape[:-1] or scale.dtype not in EXPONENTS:
                    raise misfit(
                        scale, info, f"it must be {list(info.shape[:-1])} of exponents ({' or '.join(EXPONENTS)})"
                    )
                experts, out, blocks, _ = info.shape
                presented = TensorInfo(base, PRESENTED, (experts, blocks * _BYTES * 2, out))
                yield Encoded(presented, cls(), {"codes": name, "scale": scale.name})

    def decode(self, parts: Mapping[str, Located], shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        import torch

        _, inputs, out = shape
        first, last = (
            start // out,
            math.ceil(stop / out),
        )  # rows of the presented tensor: inputs, of one expert after another
        values = torch.empty(last - first, out)
        for expert in range(first // inputs, math.ceil(last / inputs)):
            begin, end = max(first, expert * inputs), min(last, (expert + 1) * inputs)
            into = values[begin - first : end - first]
            self._fill(into, parts, expert * out, begin - expert * inputs, end - expert * inputs, inputs)
        return values.view(-1)[start - first * out : stop - first * out]

    def _fill(self, into: Tensor, parts: Mapping[str, Located], row: int, begin: int, end: int, inputs: int) -> None:
        """Inputs [begin, end) of the stored rows from ``row`` on, transposed; they lie in every row, so all are passed over."""
        from kappaquant.files.tensors import read_elements

        size = _BYTES * 2
        blocks, first, last = inputs // size, begin // size, math.ceil(end / size)
        step = max(1, _AT_ONCE // (blocks * _BYTES))
        for start in range(0, into.shape[1], step):
            stop = min(start + step, into.shape[1])
            whole = (row + start) * blocks, (row + stop) * blocks
            scales = read_scales(parts["scale"], *whole).view(-1, blocks)[:, first:last]
            codes = read_elements(*parts["codes"], *(at * _BYTES for at in whole)).view(-1, blocks, _BYTES)
            found = unpack(codes[:, first:last]).view(stop - start, last - first, size) * scales[..., None]
            into[:, start:stop] = found.view(stop - start, -1)[:, begin - first * size : end - first * size].T
