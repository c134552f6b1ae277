"""The pieces of work of ``quantize``: one slice of one tensor, read, encoded and written in place by any process.

How a tensor is cut depends on its shape alone, so that the sums of a tensor, added in order, are the same numbers
whatever the number of jobs and wherever a run was interrupted.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kappaquant.checkpoints.container import Container
from kappaquant.errors import NonFiniteError
from kappaquant.files.safetensors import DTYPE_BYTES, Stored, write_at
from kappaquant.files.tensors import FLOATS, TORCH_DTYPES, tensor_bytes
from kappaquant.formats.base import Effort, Format
from kappaquant.formats.entry import Entry
from kappaquant.kernels import dispatch
from kappaquant.planning.moments import Moments


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a source tensor, and where their encoding goes.

    They are whole rows of its last axis, whole matrices where the format is transposed.

    Attributes:
        stored: suffix -> place in the output shard.
        fmt: None where the tensor is kept.
    """

    start: int
    stop: int
    source: Entry
    target_path: Path
    container: Container
    stored: dict[str, Stored]
    fmt: Format | None
    effort: Effort
    device: str
    allow_nonfinite: bool

    @property
    def tensor(self) -> str:
        return self.source.info.name

    @property
    def nbytes(self) -> int:
        """Source bytes of this slice, as it is presented."""
        return (self.stop - self.start) * DTYPE_BYTES[self.source.info.dtype]


@dataclass
class Sums:
    """What is learnt of a slice, or, added up, of a tensor."""

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

    def measured(self, packed: bool) -> dict[str, float]:
        """What a manifest says of the tensor, to six digits."""
        found = {}
        if self.moments.count and self.moments.finite and math.isfinite(kappa := self.moments.kurtosis):
            found["kurtosis"] = _rounded(kappa)
        if packed:
            found["relative_mse"] = _rounded(self.squared_error / self.energy if self.energy else 0.0)
        return found


def encode_slice(piece: Slice) -> Sums:
    """Encode or copy one slice into the (already allocated) output shard.

    Raises:
        NonFiniteError: NaN, infinity, or values that the stored dtype can not hold; names the tensor.
    """
    weight = piece.source.elements(piece.start, piece.stop)
    info = piece.source.info
    on_device = weight.to(piece.device)
    sums = Sums(Moments.of(on_device)) if info.dtype in FLOATS else Sums()
    if not sums.moments.finite and not (piece.fmt is None and piece.allow_nonfinite):
        raise NonFiniteError(
            f"{piece.tensor}: holds NaN or infinity between elements {piece.start} and {piece.stop}; repair the source, or "
            "keep the tensor as it is with --allow-nonfinite"
        )
    if piece.fmt is None:
        stored = piece.stored[""]
        values = _converted(weight, stored.info.dtype, piece)
        write_at(piece.target_path, stored, piece.start, tensor_bytes(values))
        return sums
    rows = on_device.view(-1, info.shape[-1])
    if piece.fmt.transposed:
        rows = on_device.view(-1, *info.shape[-2:]).mT.reshape(-1, info.shape[-2])
    encoded = dispatch.encode(rows, piece.fmt.rowwise, piece.effort, name=piece.tensor)
    for suffix, part in piece.container.to_disk(piece.fmt, encoded.parts).items():
        stored = piece.stored[suffix]
        write_at(piece.target_path, stored, piece.start * stored.info.numel // info.numel, tensor_bytes(part))
    return Sums(sums.moments, encoded.squared_error, encoded.energy)


def _converted(weight: torch.Tensor, dtype: str, piece: Slice) -> torch.Tensor:
    if weight.dtype == TORCH_DTYPES[dtype]:
        return weight
    converted = weight.to(TORCH_DTYPES[dtype])
    if not bool(converted.isfinite().all()):
        raise NonFiniteError(
            f"{piece.tensor}: {piece.container.id} keeps floats as {dtype}, whose largest value is "
            f"{torch.finfo(converted.dtype).max:g}; the tensor holds {weight.double().abs().max().item():.6g}. Write the "
            "kappaquant format, which keeps dtypes"
        )
    return converted


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
