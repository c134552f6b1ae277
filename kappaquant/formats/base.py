"""What a format is: how one weight becomes named tensors, and the weight again. No torch until something is encoded.

Everything else (plans, containers, loaders, kernels' dispatch, serving engines) knows formats by this contract alone, so that a new
one runs everywhere at once: slowly, by its own ``decode_rotated``, until a kernel takes it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kappaquant.files.safetensors import DTYPE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")
Effort = Literal["fast", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "best")
Part = tuple[str, tuple[int, ...]]
"""A tensor that a weight is stored as: safetensors dtype and shape."""


@dataclass(frozen=True)
class Encoded:
    """What ``Format.encode`` made of a weight [..., out, in].

    Attributes:
        parts: suffix -> tensor, as ``Format.parts`` describes them.
        squared_error: sum of (w - decoded)^2.
        energy: sum of w^2.
    """

    parts: dict[str, Tensor]
    squared_error: float
    energy: float

    @property
    def relative_mse(self) -> float:
        return self.squared_error / self.energy if self.energy else 0.0


class Format(ABC):
    """One way to store a weight [..., out, in], of two axes or more.

    Each part keeps the leading axes: a slice of experts or of output rows is that slice of every part. Formats are values: two
    with the same ``key`` are equal, decode alike, and share kernels.

    Attributes:
        id: names it in plans and checkpoints; one id is one set of parts.
        bits: of one code, 1 to 15; by these tables group weights (16 stands for a weight that is kept).
        step: the input axis can be cut at its multiples.
        rotation: names what ``rotate`` does, so that weights of several formats can share a rotated input; empty if nothing.
        transposed: it is for weights that are stored [..., in, out], and its parts are those of ``rowwise`` of their transposition.
    """

    id: str
    bits: int
    step: int = 1
    rotation: str = ""
    transposed: bool = False

    @property
    def rowwise(self) -> Format:
        """The format of the weight as [..., out, in]: what products know."""
        return self

    @property
    def key(self) -> str:
        """The id, and whatever else decides what the parts decode to; the same in every process."""
        return self.id

    @property
    def code_bits(self) -> int:
        """Bits that a code carries, where it rides in a wider one."""
        return self.bits

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """Suffix of the stored name -> dtype and shape, for a weight of this shape; suffixes begin with a dot."""

    @abstractmethod
    def encode(self, weight: Tensor, effort: Effort = "best", *, name: str = "weight") -> Encoded:
        """Quantize a weight [..., out, in] of any float dtype; ``name`` is what an error calls it.

        Raises:
            NonFiniteError: the weight holds NaN or infinity, or values that the parts cannot.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], in_features: int) -> Tensor:
        """The weight, float32 [..., out, in_features]: the truth that every kernel is tested against."""

    def rotate(self, x: Tensor) -> Tensor:
        """What ``decode_rotated`` is multiplied by: [..., in] -> float32 [..., K]; x itself unless the format rotates."""
        return x.float()

    def decode_rotated(self, parts: Mapping[str, Tensor], in_features: int) -> Tensor:
        """float32 [..., out, K] whose product with ``rotate(x)`` is that of the weight with x."""
        return self.decode(parts, in_features)

    @abstractmethod
    def columns(self, start: int, stop: int) -> dict[str, slice]:
        """Of each part, the last axis' share that inputs [start, stop), at multiples of ``step``, need."""

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must say of it beside its id, as JSON values, so that ``restored`` gives this very format."""
        return {}

    def restored(self, settings: Mapping[str, Any]) -> Format:
        """The format of this id with such settings. Raises ValueError, saying what is expected, for others."""
        if settings:
            raise ValueError(f"{self.id} has no settings, got {dict(settings)}")
        return self

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a weight of this shape."""
        return sum(DTYPE_BYTES[dtype] * math.prod(part) for dtype, part in self.parts(shape).values())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits per weight, padding and scales included."""
        return 8 * self.nbytes(shape) / math.prod(shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key})"
