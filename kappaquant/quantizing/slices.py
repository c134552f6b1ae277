"""The pieces of work of ``quantize``: one slice of one tensor, read, encoded and written in place by any process.

How a tensor is cut depends on its shape alone, so that the sums of a tensor, added in order, are the same numbers
whatever the number of jobs and wherever a run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kappaquant.checkpoints.layout import Target
from kappaquant.errors import NonFiniteError
from kappaquant.files.safetensors import Stored, read_bytes, write_bytes
from kappaquant.files.tensors import TORCH_DTYPES, read_elements
from kappaquant.formats import codec
from kappaquant.formats.codebook import DTYPE_BYTES, LEGACY_FORMAT, NORMS_SUFFIX, PACKED_SUFFIX, Format, legacy_codebook
from kappaquant.kernels import dispatch as ops
from kappaquant.planning.moments import Moments

UNIT_ELEMENTS = (
    1 << 23
)  # 16 MB of bf16: little memory, and still milliseconds of work for each message between processes
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Unit:
    """Elements [start, stop) of a source tensor, whole rows of its last axis, and where their encoding goes."""

    start: int
    stop: int
    source_path: Path
    source: Stored
    target_path: Path
    target: Target
    stored: dict[str, Stored]
    fmt: Format | None
    effort: codec.Effort
    device: str
    allow_nonfinite: bool

    @property
    def name(self) -> str:
        return self.source.info.name

    @property
    def nbytes(self) -> int:
        """Source bytes of this unit."""
        return (self.stop - self.start) * DTYPE_BYTES[self.source.info.dtype]


@dataclass
class Sums:
    """What is learnt of a unit, or, added up, of a tensor."""

    moments: Moments = field(default_factory=Moments)
    squared_error: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.moments + other.moments, self.squared_error + other.squared_error, self.energy + other.energy)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sums:
        return cls(Moments(**data["moments"]), data["squared_error"], data["energy"])


def ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cuts of a tensor, in elements, at whole rows of the last axis. An empty tensor has none."""
    row = shape[-1] if shape else 1
    total = math.prod(shape)
    step = max(1, UNIT_ELEMENTS // max(row, 1)) * row
    return ((start, min(start + step, total)) for start in range(0, total, step or 1))


def run_unit(unit: Unit) -> Sums:
    """Encode or copy one unit into the (already allocated) output shard.

    Raises:
        NonFiniteError: NaN, infinity, or values that the stored dtype can not hold; names the tensor.
    """
    weight = read_elements(unit.source_path, unit.source, unit.start, unit.stop)
    info = unit.source.info
    on_device = weight.to(unit.device)
    sums = Sums(Moments.of(on_device)) if info.dtype in FLOATS else Sums()
    if not sums.moments.finite and not (unit.fmt is None and unit.allow_nonfinite):
        raise NonFiniteError(
            f"{unit.name}: holds NaN or infinity between elements {unit.start} and {unit.stop}; repair the source, or keep "
            "the tensor as it is with --allow-nonfinite"
        )
    descriptor = os.open(unit.target_path, os.O_WRONLY)
    try:
        if unit.fmt is None:
            stored = unit.stored[unit.name]
            _write(descriptor, stored, unit.start, _convert(weight, stored.info.dtype, unit))
            return sums
        legacy = unit.target == LEGACY_FORMAT
        encoded = ops.encode(
            on_device.view(-1, info.shape[-1]),
            unit.fmt,
            unit.effort,
            codebook=legacy_codebook(unit.fmt.bits, unit.fmt.group_size) if legacy else None,
            norm_dtype=torch.float32 if legacy else torch.float16,
            name=unit.name,
        )
        packed = codec.unpack(encoded.packed, unit.fmt) if legacy and unit.fmt.bits > 4 else encoded.packed
        groups = unit.start // info.shape[-1] * unit.fmt.groups(info.shape[-1])
        per_group = packed.numel() // encoded.norms.numel()
        _write(descriptor, unit.stored[unit.name + PACKED_SUFFIX], groups * per_group, packed)
        _write(descriptor, unit.stored[unit.name + NORMS_SUFFIX], groups, encoded.norms)
        return Sums(sums.moments, encoded.squared_error, encoded.energy)
    finally:
        os.close(descriptor)


def _convert(weight: torch.Tensor, dtype: str, unit: Unit) -> torch.Tensor:
    if weight.dtype == TORCH_DTYPES[dtype]:
        return weight
    converted = weight.to(TORCH_DTYPES[dtype])
    if not bool(converted.isfinite().all()):
        raise NonFiniteError(
            f"{unit.name}: {unit.target} keeps floats as {dtype}, whose largest value is {torch.finfo(converted.dtype).max:g}; "
            f"the tensor holds {weight.double().abs().max().item():.6g}. Write the kappaquant format, which keeps dtypes"
        )
    return converted


def tensor_bytes(values: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order."""
    return values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _write(descriptor: int, stored: Stored, element: int, values: torch.Tensor) -> None:
    write_bytes(descriptor, tensor_bytes(values), stored.offset + element * DTYPE_BYTES[stored.info.dtype])


def hash_stored(path: Path, stored: Stored) -> str:
    """SHA-256 (hexadecimal) of a stored tensor's bytes, read back from the file."""
    digest = hashlib.sha256()
    end = stored.offset + stored.info.nbytes
    for offset in range(stored.offset, end, UNIT_ELEMENTS):
        digest.update(read_bytes(path, offset, min(UNIT_ELEMENTS, end - offset)))
    return digest.hexdigest()
