"""Codebook formats as data: sizes, centroids, names on disk. No torch until something is encoded; docs/format.md is normative."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from kappaquant.errors import FormatError, PlanError
from kappaquant.formats.base import Effort, Encoded, Format, Part
from kappaquant.formats.signs import GROUP_SIZES, check_group_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kappaquant.formats.search import Rounding

PACKED_SUFFIX = ".tq_packed"
NORMS_SUFFIX = ".tq_norms"
BITS = range(2, 9)
NORM_DTYPES = ("F16", "F32")
AUTO: Literal["auto"] = "auto"
"""In place of a group size: what suits each weight's input axis; see ``fitting``."""
GroupSize = int | Literal["auto"]
_AUTO_SIZES = (128, 64, 32)


class GroupedFormat(Format):
    """Groups of rotated weights, each stored as an index into ascending values for every weight, times the group's norm.

    Which index a weight may have, and how the indices of a group lie in its bytes, is the kind's own: see ``pack_block``.

    Args:
        format_id: such as "tq3g128".
        codebook: ascending values, float32 numbers symmetric about 0; ``usual`` is that which needs no word in ``key``.
        norms: dtype of the norms, "F16" or "F32".
    """

    def __init__(
        self,
        format_id: str,
        bits: int,
        group_size: int,
        codebook: tuple[float, ...],
        usual: tuple[float, ...],
        norms: str,
    ) -> None:
        self.id, self.bits = format_id, bits
        self.group_size = self.step = group_size
        self.rotation = f"signs-wht-signs/{group_size}"
        self.norms = norms
        self.codebook = codebook
        own = "" if codebook == usual else f"+{_digest(codebook)}"
        self._key = f"{self.id}{own}" + ("" if norms == "F16" else f"+{norms}")

    @property
    def key(self) -> str:
        return self._key

    @property
    def bytes_per_group(self) -> int:
        return self.group_size * self.bits // 8

    def groups(self, in_features: int) -> int:
        """Groups per row; the last one is padded with zeros."""
        return -(-in_features // self.group_size)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], self.groups(shape[-1]) * self.bytes_per_group)

    def norms_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], self.groups(shape[-1]))

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {PACKED_SUFFIX: ("U8", self.packed_shape(shape)), NORMS_SUFFIX: (self.norms, self.norms_shape(shape))}

    @abstractmethod
    def variant(self, codebook: tuple[float, ...], norms: str) -> GroupedFormat:
        """The format of this id with another codebook of as many values, and norms of this dtype."""

    @abstractmethod
    def pack_block(self, indices: Tensor) -> Tensor:
        """uint8 indices [group_size, M] of M groups, as they may be, -> their bytes [bytes_per_group, M]."""

    @abstractmethod
    def unpack_block(self, packed: Tensor) -> Tensor:
        """Inverse of ``pack_block``."""

    @abstractmethod
    def rounding(self, count: int, device: torch.device) -> Rounding:
        """What finds the indices of blocks of ``count`` groups."""

    def encode(self, weight: Tensor, effort: Effort = "best", *, name: str = "weight") -> Encoded:
        from kappaquant.formats import codec

        return codec.encode(weight, self, effort, name=name)

    def decode(self, parts: Mapping[str, Tensor], in_features: int) -> Tensor:
        from kappaquant.formats import codec

        return codec.decode(parts[PACKED_SUFFIX], parts[NORMS_SUFFIX], self, in_features)

    def rotate(self, x: Tensor) -> Tensor:
        from kappaquant.formats import codec

        return codec.rotate(x, self.group_size)

    def decode_rotated(self, parts: Mapping[str, Tensor], in_features: int) -> Tensor:
        from kappaquant.formats import codec

        return codec.decode_rotated(parts[PACKED_SUFFIX], parts[NORMS_SUFFIX], self)

    def columns(self, start: int, stop: int) -> dict[str, slice]:
        first, last = start // self.group_size, start // self.group_size + self.groups(stop - start)
        width = self.bytes_per_group
        return {PACKED_SUFFIX: slice(first * width, last * width), NORMS_SUFFIX: slice(first, last)}

    def settings(self) -> dict[str, Any]:
        return {"codebook": list(self.codebook), "norms": self.norms}

    def restored(self, settings: Mapping[str, Any]) -> GroupedFormat:
        book, norms, count = settings.get("codebook"), settings.get("norms", "F16"), len(self.codebook)
        if not isinstance(book, list) or len(book) != count or not _ascending(book):
            raise ValueError(f"no codebook of {count} ascending values for {self.id}")
        return self.variant(tuple(book), norms)

    def __reduce__(self) -> tuple[type[GroupedFormat], tuple[Any, ...]]:
        return type(self), (self.bits, self.group_size, self.codebook, self.norms)


class CodebookFormat(GroupedFormat):
    """Each weight has its own code for one of 2**bits centroids.

    Args:
        codebook: ascending centroids, float32 values symmetric about 0; by default the unit Gaussian's Lloyd-Max
            centroids over sqrt(group_size).
        norms: dtype of the norms, "F16" or "F32".

    Raises:
        PlanError: bits or group size out of range.
    """

    def __init__(
        self, bits: int, group_size: int, codebook: tuple[float, ...] | None = None, norms: str = "F16"
    ) -> None:
        check_bits(bits)
        check_group_size(group_size)
        usual = gaussian_codebook(bits, group_size)
        super().__init__(
            f"tq{bits}g{group_size}", bits, group_size, usual if codebook is None else codebook, usual, norms
        )

    @property
    def code_bits(self) -> int:
        return (len(set(self.codebook)) - 1).bit_length()

    def variant(self, codebook: tuple[float, ...], norms: str) -> CodebookFormat:
        return CodebookFormat(self.bits, self.group_size, codebook, norms)

    def pack_block(self, indices: Tensor) -> Tensor:
        from kappaquant.formats import codec

        return codec.pack_block(indices, self.bits)

    def unpack_block(self, packed: Tensor) -> Tensor:
        from kappaquant.formats import codec

        return codec.unpack_block(packed, self.bits)

    def rounding(self, count: int, device: torch.device) -> Rounding:
        from kappaquant.formats.search import NearestRounding

        return NearestRounding(self.group_size, count, device, self.codebook)


@cache
def fitting(bits: int, in_features: int, group_size: GroupSize = AUTO) -> CodebookFormat:
    """The codebook format of this width for an input axis.

    With "auto" groups are the largest power of two from 32 to 128 that divides the axis, or 128 with the last group padded where
    that takes fewer bytes, or where none divides it.

    Raises:
        PlanError: bits or group size out of range.
    """
    if group_size != AUTO:
        return CodebookFormat(bits, group_size)
    row = (in_features,)
    padded = CodebookFormat(bits, 128)
    dividing = next((size for size in _AUTO_SIZES if in_features % size == 0), 128)
    found = CodebookFormat(bits, dividing)
    return padded if padded.nbytes(row) < found.nbytes(row) else found


def check_bits(bits: int) -> None:
    """Raise PlanError for a width that no codebook has."""
    if isinstance(bits, bool) or bits not in BITS:
        raise PlanError(f"bits = {bits!r}: a codebook has 2 to 8 bits; 16 keeps a tensor as it is")


def check_group_choice(group_size: object) -> None:
    """Raise PlanError for what is neither a group size nor "auto"."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size != AUTO and not (whole and group_size in GROUP_SIZES):
        allowed = ", ".join(map(str, GROUP_SIZES))
        raise PlanError(
            f"group size {group_size!r}: must be auto, or a power of two for the Hadamard rotation: {allowed}"
        )


def float32(value: float) -> float:
    """``value`` rounded to the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def symmetric(half: list[float]) -> tuple[float, ...]:
    return (*(-c for c in reversed(half)), *half)


@cache
def gaussian_codebook(bits: int, group_size: int) -> tuple[float, ...]:
    """The 2**bits centroids, ascending, as float32 values: unit-Gaussian Lloyd-Max over sqrt(group_size)."""
    half = codebook_data()["gaussian"][str(bits)]
    return symmetric([float32(c / math.sqrt(group_size)) for c in half])


@cache
def codebook_data() -> dict[str, dict]:
    """``codebooks.json``: "gaussian" (converged, unit variance) and "tq3_native" (the published literals, per group size)."""
    return json.loads(resources.files("kappaquant.formats").joinpath("codebooks.json").read_text())


def published_codebook(bits: int, group_size: int) -> tuple[float, ...]:
    """The centroids of published tq3_native files, float32 literals: their Lloyd iterations stopped early, so they are no formula.

    Raises:
        FormatError: no file with this width and group was ever seen.
    """
    books = codebook_data()["tq3_native"]
    half = books.get(str(group_size), {}).get(str(bits))
    if half is None:
        raise FormatError(
            f"tq3_native has no known codebook for {bits} bits at group size {group_size}; "
            f"known: bits {', '.join(books['128'])} at groups {', '.join(books)}"
        )
    return symmetric(half)


def _digest(codebook: tuple[float, ...]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(codebook)}d", *codebook)).hexdigest()[:12]


def _ascending(book: list[Any]) -> bool:
    numbers = all(type(c) in (int, float) and math.isfinite(c) for c in book)
    return numbers and all(low < high for low, high in pairwise(book))


FORMATS: dict[str, CodebookFormat] = {
    fmt.id: fmt for fmt in (CodebookFormat(bits, group_size) for bits in BITS for group_size in GROUP_SIZES)
}
