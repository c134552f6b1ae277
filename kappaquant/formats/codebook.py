"""The formats as data: ids, sizes, signs, codebooks, names on disk. Standard library only; docs/format.md is normative."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from functools import cache
from importlib import resources

from kappaquant.errors import FormatError, PlanError

QUANT_METHOD = "kappaquant"
FORMAT_VERSION = 1
ROTATION = "signs-wht-signs/1"
PACKED_SUFFIX = ".tq_packed"
NORMS_SUFFIX = ".tq_norms"
MANIFEST_NAME = "kappaquant.json"
EVALUATION_NAME = "evaluation.json"  # of one checkpoint: no copy takes it along
CARD_MARK = "<!-- kappaquant card:"  # begins the last line of a model card that was made here
LEGACY_CONFIG_NAME = "tq_config.json"
LEGACY_FORMAT = "tq3_native"
LEGACY_SEED = 42

BITS = range(2, 9)
GROUP_SIZES = (32, 64, 128, 256)

# bit i of this little-endian stream is sign draw i: 1 is +1, 0 is -1. These are the first 512 draws of MT19937
# seeded with 42, one per 32-bit output, lowest bit; written out so that no framework's generator is needed.
_SIGN_BITS = int.from_bytes(
    bytes.fromhex(
        "2242d73f177cab01f6ba4affe75f6b6507d021a85ce6402438d201c5cbbf2514"
        "26ceab17e2897d893dd3ac5836c9bc75027bf31b7ea93e9a3e53a5aaab248ab4"
    ),
    "little",
)

# safetensors dtype -> bytes per element
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor: no data.

    Attributes:
        name: key in the checkpoint.
        dtype: safetensors dtype string, one of ``DTYPE_BYTES``.
        shape: logical shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Format:
    """One way to store a weight: ``bits`` per index, groups of ``group_size`` along the last axis, one float16 norm each."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)

    @property
    def id(self) -> str:
        return f"tq{self.bits}g{self.group_size}"

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

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a weight of this shape: packed indices plus float16 norms."""
        return math.prod(self.packed_shape(shape)) + 2 * math.prod(self.norms_shape(shape))

    @property
    def codebook(self) -> tuple[float, ...]:
        """The 2**bits centroids, ascending, as float32 values: unit-Gaussian Lloyd-Max over sqrt(group_size)."""
        half = codebook_data()["gaussian"][str(self.bits)]
        return symmetric([float32(c / math.sqrt(self.group_size)) for c in half])


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise PlanError(f"bits = {bits!r}: a codebook has 2 to 8 bits; 16 keeps a tensor as it is")


def check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        raise PlanError(f"group size {group_size!r}: the Hadamard rotation needs a power of two, one of {allowed}")


FORMATS: dict[str, Format] = {f.id: f for f in (Format(bits, group) for bits in BITS for group in GROUP_SIZES)}


def format_by_id(format_id: str, tensor: str) -> Format:
    """The registry's entry for an id read from a checkpoint; ``tensor`` is named when there is none."""
    if format_id not in FORMATS:
        raise FormatError(f"{tensor}: unknown format id {format_id!r}; this version reads {', '.join(FORMATS)}")
    return FORMATS[format_id]


def float32(value: float) -> float:
    """``value`` rounded to the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def symmetric(half: list[float]) -> tuple[float, ...]:
    return (*(-c for c in reversed(half)), *half)


@cache
def codebook_data() -> dict[str, dict]:
    """``codebooks.json``: "gaussian" (converged, unit variance) and "tq3_native" (the published literals, per group size)."""
    return json.loads(resources.files("kappaquant.formats").joinpath("codebooks.json").read_text())


def legacy_codebook(bits: int, group_size: int) -> tuple[float, ...]:
    """The published tool's centroids, float32 literals: its Lloyd iterations stopped early, so they are no formula."""
    books = codebook_data()["tq3_native"]
    half = books.get(str(group_size), {}).get(str(bits))
    if half is None:
        raise FormatError(
            f"tq3_native has no known codebook for {bits} bits at group size {group_size}; "
            f"known: bits {', '.join(books['128'])} at groups {', '.join(books)}"
        )
    return symmetric(half)


@cache
def signs(group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rotation's two sign vectors (s1, s2), each of ``group_size`` entries +1 or -1."""
    check_group_size(group_size)
    draws = tuple(1 if _SIGN_BITS >> i & 1 else -1 for i in range(2 * group_size))
    return draws[:group_size], draws[group_size:]
