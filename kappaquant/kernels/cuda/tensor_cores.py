"""Products with codebooks and trellis codes on NVIDIA tensor cores (compute capability 8.0 and later), compiled by NVRTC.

The rotated input becomes int8 or float16 with one scale per token and group, the codes become the other operand in
registers by byte permutes: no weight is ever written back. int8 serves 2 to 5 bits; float16 all widths.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc, tables, tiles
from kappaquant.kernels.cuda.arguments import KINDS, address
from kappaquant.kernels.cuda.cells import TRELLIS_NUMBERS, cells, unfit
from kappaquant.kernels.cuda.inputs import Input
from kappaquant.kernels.cuda.launches import Items

NAME = "tensor_cores"
INT8_BITS = (2, 3, 4, 5)  # above, rounding a codebook to int8 would cost more than the width gains
MOST_OUTPUTS = 4
_ONES = 0x3C003C00  # float16 1 twice


class _Table(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint32 * 8),
        ("half", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("ones", ctypes.c_uint32),
    )


class Codes(ctypes.Structure):
    """``Codes`` of product.cuh."""

    _fields_ = (("codes", ctypes.c_void_p), ("norms", ctypes.c_void_p), ("table", _Table))


class Segment(ctypes.Structure):
    """``Segment`` of product.cuh."""

    _fields_ = (
        ("weight", Codes), ("out", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("rows", ctypes.c_int),
        ("first_block", ctypes.c_int),
    )  # fmt: skip


class Inputs(ctypes.Structure):
    """``Inputs`` of product.cuh."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("offsets", ctypes.c_void_p), ("padded", ctypes.c_int),
        ("k", ctypes.c_int),
    )  # fmt: skip

    @classmethod
    def of(cls, x: Input) -> Inputs:
        return cls(x.values.data_ptr(), x.scales.data_ptr(), x.offsets.data_ptr(), x.scales.shape[1], x.values.shape[1])


class _Linear(ctypes.Structure):
    _fields_ = (
        ("segments", Segment * MOST_OUTPUTS), ("inputs", Inputs), ("tokens", ctypes.c_int), ("out_kind", ctypes.c_int),
        ("items", ctypes.c_void_p), ("rows_of", ctypes.c_void_p),
    )  # fmt: skip


nvrtc.declare("linear.cu", _Table, Codes, Inputs, Segment, _Linear)


@dataclass(frozen=True)
class Weight:
    """A weight [rows, in_features], or of experts [E, rows, in_features], in tiles, with the tables of its format.

    The tiles serve int8 and float16 inputs alike; only the table that decodes them differs.
    """

    tiled: tiles.Tiled
    fmt: GroupedFormat
    rows: int
    in_features: int

    @classmethod
    def of(cls, packed: Tensor, norms: Tensor, fmt: GroupedFormat, in_features: int) -> Weight:
        """From the bytes on disk: packed uint8 [..., n, bytes], norms float16 [..., n, G], on a CUDA device.

        Raises:
            UnsupportedError: see ``refusal``.
        """
        reason = refusal(packed.device, fmt)
        if reason:
            raise UnsupportedError(f"{NAME}: {reason}")
        return cls(tiles.tile(packed, norms, fmt), fmt, norms.shape[-2], in_features)

    def parameters(self, half: bool) -> Codes:
        """What a kernel needs to decode it to float16, or to int8."""
        table = _table(self.fmt, half, self.tiled.codes.device)
        return Codes(self.tiled.codes.data_ptr(), self.tiled.norms.data_ptr(), table)


@cache
def _table(fmt: GroupedFormat, half: bool, device: torch.device) -> _Table:
    if tables.shared_bytes(cells(fmt), half):
        entries, scale = _entries(fmt, device)
        return _Table(half=entries.data_ptr(), scale=scale, ones=_ONES)
    words, scale = (tables.half_table if half else tables.int8_table)(cells(fmt))
    table = _Table(scale=scale, ones=_ONES)
    table.bytes[: len(words)] = words
    return table


@cache
def _entries(fmt: GroupedFormat, device: torch.device) -> tuple[Tensor, float]:
    """(float16 entries on the device, scale) of the wide tables; the cache keeps what tables point to."""
    words, scale = tables.half_table(cells(fmt))
    return torch.tensor(words, dtype=torch.int64).to(device, torch.int32), scale


def numbers(weights: Sequence[Weight], most: int) -> list[int]:
    """The formats of ``most`` outputs as kernels' templates call them, 0 for none."""
    return [cells(w.fmt).number for w in weights] + [0] * (most - len(weights))


def table_bytes(weights: Iterable[Weight], half: bool) -> int:
    """Shared memory of the largest table that a thread block needs."""
    return max(tables.shared_bytes(cells(w.fmt), half) for w in weights)


@dataclass(frozen=True)
class Launch:
    """How a product is spread over the card.

    Attributes:
        token_tiles: blocks of 8 tokens that a thread block multiplies.
        tiles: tiles of 32 rows in a thread block, which then reads its tokens once for all of them.
        warps: warps of a thread block, a multiple of ``tiles``; those of one tile split the input axis.
        resident: warps that a multiprocessor must hold, which bounds registers; 0 leaves them to the compiler.
        stages: units of 128 inputs that a warp reads ahead by shared memory, and the one it multiplies; 0 reads one by registers.
    """

    token_tiles: int
    tiles: int
    warps: int
    resident: int
    stages: int = 0

    @property
    def tokens(self) -> int:
        """Of a thread block."""
        return 8 * self.token_tiles

    def instance(self, formats: Sequence[int], group_size: int, half: bool, items: bool = False) -> str:
        """Of the kernel template, for outputs of these formats (``numbers``)."""
        flags = f"{self.token_tiles}, {self.tiles}, {self.warps}, {self.resident}, {self.stages}, {str(items).lower()}"
        return f"linear<{', '.join(map(str, formats))}, {group_size}, {str(half).lower()}, {flags}>"


# (warps of a multiprocessor, units that a warp has in shared memory) of int8 inputs of up to 8 tokens, by the numbers of ``cells``
_RESIDENT = {
    2: (24, 0), 3: (28, 0), 4: (28, 3), TRELLIS_NUMBERS + 2: (28, 3), TRELLIS_NUMBERS + 3: (16, 3), TRELLIS_NUMBERS + 4: (16, 3)
}  # fmt: skip


def choose(tokens: int, tile_count: int, units: int, formats: Sequence[int], half: bool) -> Launch:
    """As measured on an H200 (``benchmarks/gpu_kernels.py``): 1700 warps fill it, and fewer warps to a tile save sums.

    Args:
        formats: of the weights, as ``numbers`` has them.
        half: whether inputs are float16.
    """
    most_by_two = 16 if half else 32 if tile_count > 512 else 64  # tokens that are best multiplied by 16 at a time
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= most_by_two else 4 if tokens <= 64 else 16
    if token_tiles == 4:
        return Launch(token_tiles, 2, 4, 0)
    warps, most = 4, 4 if token_tiles == 16 else 16  # their sums must fit in shared memory
    blocks = tile_count * -(-tokens // (8 * token_tiles))
    while warps < most and blocks * warps < 1700 and 4 * warps <= units:
        warps *= 2
    if token_tiles == 16 or (half and token_tiles == 2):
        return Launch(token_tiles, 1, warps, 0)
    found = [_resident(fmt, token_tiles, half or warps > 4 or units < 8 * warps) for fmt in formats if fmt]
    return Launch(token_tiles, 1, warps, min(held for held, _ in found), max(stages for _, stages in found))


def choose_for_experts(tokens: int, items: float, tile_count: int, units: int, fmt: int, half: bool) -> Launch:
    """The launch for up to 16 tokens of each expert, as measured on an H200: a warp for each tile, or several where there are few warps.

    Args:
        items: that have tokens.
        tile_count: of a matrix.
        fmt: as ``numbers`` has it.
    """
    shared = 2 if half else 1
    while shared < 4 and items * tile_count * shared < 3500 and units >= 6 * shared:
        shared *= 2
    stages = 3 if fmt > TRELLIS_NUMBERS and not half and shared == 1 and units >= 8 else 0
    return Launch(-(-tokens // 8), 4 // shared, 4, 16, stages)


def _resident(fmt: int, token_tiles: int, registers: bool) -> tuple[int, int]:
    """Warps of a multiprocessor, and units that a warp has in shared memory, at up to 16 tokens.

    Args:
        registers: read ahead by registers, as float16 inputs want, which are as large, and warps of few units.
    """
    if token_tiles == 2:
        return 16, 3 if fmt > TRELLIS_NUMBERS and not registers else 0
    if registers:
        return {2: 24, 3: 28}.get(fmt, 16), 0
    return _RESIDENT.get(fmt, (16, 0))


def linear(
    x: Input, weights: Sequence[Weight], dtype: torch.dtype, biases: Sequence[Tensor | None] | None = None,
    launch: Launch | None = None, items: Items | None = None,
) -> list[Tensor]:  # fmt: skip
    """x times each weight, [tokens, rows] each, in one launch; the weights share group size and width, not bits.

    Args:
        biases: [rows] in ``dtype``, or None, for each weight.
        launch: by default as ``choose`` says.
        items: for weights of experts [E, rows, in_features]: which rows of x meet which expert, at most as many as ``launch`` takes.

    Raises:
        UnsupportedError: more than four weights, or widths that the input's type does not serve.
    """
    tokens, k = x.values.shape
    check(NAME, k, x.group_size, x.half, weights, items)
    outs = [torch.empty(items.rows if items else tokens, w.rows, dtype=dtype, device=x.values.device) for w in weights]
    if not tokens:
        return outs
    formats = numbers(weights, MOST_OUTPUTS)
    tile_counts = [-(-w.rows // tiles.ROWS) for w in weights]
    use = launch or choose(tokens, sum(tile_counts), k // tiles.INPUTS, formats, x.half)
    if items is not None and use.token_tiles > 2:
        raise UnsupportedError(
            f"{NAME}: {use} reads beyond the places of an expert, which are multiples of 8: at most 2 token_tiles"
        )
    parameters = _Linear(
        inputs=Inputs.of(x), tokens=tokens, out_kind=KINDS[dtype], items=address(items.work if items else None),
        rows_of=address(items.rows_of if items else None),
    )  # fmt: skip
    blocks = 0
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        parameters.segments[i] = Segment(
            weight.parameters(x.half), out.data_ptr(), address(biases[i] if biases else None), weight.rows, blocks,
        )  # fmt: skip
        blocks += -(-tile_counts[i] // use.tiles)
    shared = use.warps * (4 * 8 * use.token_tiles * 33 + use.stages * max(stage_bytes(w.fmt) for w in weights))
    instance = use.instance(formats, x.group_size, x.half, items is not None)
    run = nvrtc.kernel("linear.cu", instance, x.values.device.index, shared + table_bytes(weights, x.half))
    parts = items.work.shape[0] if items else -(-tokens // (8 * use.token_tiles))
    run((blocks, parts, 1), 32 * use.warps, parameters, early=True)
    return outs


def stage_bytes(fmt: GroupedFormat) -> int:
    """Shared memory for a unit: its codes, norms, and the path bits before it where a ring is wider (``Staged`` of product.cuh)."""
    group = fmt.group_size
    wide_rings = cells(fmt).number > TRELLIS_NUMBERS and group > tiles.INPUTS
    return 512 * fmt.bits + 64 * max(1, tiles.INPUTS // group) + 128 * wide_rings


def check(name: str, k: int, group_size: int, half: bool, weights: Sequence[Weight], items: Items | None) -> None:
    """Raise UnsupportedError for weights that do not go with an input of k values, or with items."""
    if not 1 <= len(weights) <= MOST_OUTPUTS:
        raise UnsupportedError(f"{name}: {len(weights)} weights share an input; one launch takes 1 to {MOST_OUTPUTS}")
    for weight in weights:
        if (group_size, k) != (weight.fmt.group_size, tiles.padded(weight.in_features, weight.fmt)):
            raise UnsupportedError(
                f"{name}: the input is [{k}] in groups of {group_size}; a weight [{weight.rows}, {weight.in_features}] "
                f"is {weight.fmt.id}"
            )
        if not half and weight.fmt.bits not in INT8_BITS:
            raise UnsupportedError(
                f"{name}: int8 inputs serve {', '.join(map(str, INT8_BITS))} bits, not {weight.fmt.bits}; float16 inputs serve all"
            )
        if (weight.tiled.codes.dim() == 6) != (items is not None):
            raise UnsupportedError(f"{name}: weights of experts need items, and others take none")


def refusal(device: torch.device, fmt: Format) -> str | None:
    """Why a weight can not be multiplied here, or None."""
    if reason := unfit(fmt):
        return reason
    assert isinstance(fmt, GroupedFormat)
    if any(a != -b for a, b in zip(fmt.codebook, reversed(fmt.codebook), strict=True)):
        return "the codebook is not symmetric about 0"
    return _without_tables(fmt) or gpu.refusal(device)


@cache
def _without_tables(fmt: GroupedFormat) -> str | None:
    return tables.unfit(cells(fmt))
