"""One parameter in files: what it is, where its bytes are, and how rows of it are read. Torch only once elements are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kappaquant.errors import FormatError
from kappaquant.files.safetensors import Stored, TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.transposed import swapped

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BITS = 16
"""What counts as the bits of a parameter that is stored as it is, whatever its dtype."""
Located = tuple[Path, Stored]


def stored_parts(info: TensorInfo, fmt: Format | None) -> dict[str, TensorInfo]:
    """Suffix -> what stands in a file for a parameter in a format; itself where it is kept, with an empty suffix."""
    if fmt is None:
        return {"": info}
    return {s: TensorInfo(info.name + s, dtype, shape) for s, (dtype, shape) in fmt.parts(info.shape).items()}


@dataclass(frozen=True)
class Entry:
    """One parameter of a source or checkpoint; small, and the same in every process.

    Attributes:
        info: name, source dtype and logical shape.
        fmt: how it is packed, None where it is kept.
        parts: suffix -> where that part is; the suffix of a kept parameter is empty.
    """

    info: TensorInfo
    fmt: Format | None
    parts: dict[str, Located]

    @property
    def bits(self) -> int:
        """Bits that a code carries, 16 where the parameter is kept."""
        return self.fmt.code_bits if self.fmt else KEPT_BITS

    @property
    def rows(self) -> int:
        """All axes but the last, flattened."""
        return math.prod(self.info.shape[:-1])

    @property
    def part_rows(self) -> int:
        """Rows of its parts, all axes but the last, flattened: those of the transposed matrices where the format is transposed."""
        shape = self.info.shape
        return math.prod(swapped(shape)[:-1]) if self.fmt and self.fmt.transposed else self.rows

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(stored.info.nbytes for _, stored in self.parts.values())

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a kept parameter, flat."""
        from kappaquant.files.tensors import read_elements

        if self.fmt is not None:
            raise FormatError(f"{self.info.name}: is quantized to {self.bits} bits; decode it, or read its parts")
        path, stored = self.parts[""]
        return read_elements(path, stored, start, stop)

    def read_parts(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop), of ``part_rows``, of every part of a packed parameter, as its format describes them."""
        from kappaquant.files.tensors import read_elements

        if self.fmt is None:
            raise FormatError(f"{self.info.name}: is kept as {self.info.dtype}; it has no parts")
        found = {}
        for suffix, (path, stored) in self.parts.items():
            width = stored.info.numel // max(1, self.part_rows)
            found[suffix] = read_elements(path, stored, start * width, stop * width).view(stop - start, width)
        return found

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the parameter seen as [rows, last axis]: float32, decoded if it is packed.

        Of a transposed format every matrix that such a row is in is decoded.
        """
        width = self.info.shape[-1]
        if self.fmt is None:
            return self.elements(start * width, stop * width).view(stop - start, width).float()
        if not self.fmt.transposed:
            return self.fmt.decode(self.read_parts(start, stop), width)
        inputs = self.info.shape[-2]
        first, last = start // inputs, -(-stop // inputs)
        parts = self.read_parts(first * width, last * width)
        matrices = {suffix: part.view(last - first, width, part.shape[-1]) for suffix, part in parts.items()}
        rows = self.fmt.decode(matrices, inputs).reshape(-1, width)
        return rows[start - first * inputs : stop - first * inputs]

    def read(self) -> Tensor:
        """The whole parameter in its shape: as it is stored if kept, else decoded to float32."""
        if self.fmt is None:
            return self.elements(0, self.info.numel).view(self.info.shape)
        return self.read_rows(0, self.rows).view(self.info.shape)
