"""Codebook products on NVIDIA tensor cores (compute capability 8.0 and later), compiled by NVRTC.

The rotated input becomes int8 or float16 with one scale per token and group, the codes become the other operand in
registers by byte permutes: no weight is ever written back. int8 serves 2 to 5 bits; float16 all widths.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.format import Format, signs
from kappaquant.kernels import nvrtc, tiles

NAME = "tensor_cores"
INT8_BITS = (2, 3, 4, 5)  # above, rounding a codebook to int8 would cost more than the width gains
_MOST_OUTPUTS = 4
_TABLE_BYTES = {6: 4 << 12, 7: 128 << 7, 8: 128 << 8}  # in shared memory: pairs of codes, or a copy for each lane
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Table(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint32 * 8), ("half", ctypes.c_void_p), ("scale", ctypes.c_float))


class _Segment(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p), ("norms", ctypes.c_void_p), ("out", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int), ("first_block", ctypes.c_int), ("table", _Table),
    )  # fmt: skip


class _Linear(ctypes.Structure):
    _fields_ = (
        ("segments", _Segment * _MOST_OUTPUTS), ("x", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("halves", ctypes.c_void_p), ("tokens", ctypes.c_int), ("tokens_padded", ctypes.c_int), ("k", ctypes.c_int),
        ("out_kind", ctypes.c_int),
    )  # fmt: skip


class _Rotate(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("other", ctypes.c_void_p), ("sum", ctypes.c_void_p), ("gain", ctypes.c_void_p),
        ("signs", ctypes.c_void_p), ("out", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("halves", ctypes.c_void_p),
        ("stride", ctypes.c_longlong), ("width", ctypes.c_int), ("k", ctypes.c_int), ("tokens_padded", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A weight [rows, in_features] in tiles, with the tables of its codebook."""

    tiled: tiles.Tiled
    fmt: Format
    rows: int
    in_features: int
    half: bool
    table: _Table
    half_entries: Tensor | None  # keeps what ``table.half`` points to

    @classmethod
    def of(
        cls, packed: Tensor, norms: Tensor, fmt: Format, in_features: int, codebook: Sequence[float], half: bool
    ) -> Weight:
        """From the bytes on disk: packed uint8 [n, bytes], norms float16 [n, G], on a CUDA device.

        Args:
            half: for float16 inputs; else int8.

        Raises:
            UnsupportedError: see ``refusal``.
        """
        reason = refusal(fmt, half, norms.dtype, packed.device, codebook)
        if reason:
            raise UnsupportedError(f"{NAME}: {reason}")
        words, scale = (tiles.half_table if half else tiles.int8_table)(codebook, fmt.bits)
        entries = None
        table = _Table(scale=scale)
        if fmt.bits > 5:
            entries = torch.tensor(words, dtype=torch.int64).to(packed.device, torch.int32)
            table.half = entries.data_ptr()
        else:
            table.bytes[: len(words)] = words
        return cls(tiles.tile(packed, norms, fmt), fmt, norms.shape[0], in_features, half, table, entries)


@dataclass(frozen=True)
class Input:
    """A rotated input of ``tokens`` rows, int8 or float16 [tokens, k], with float32 scales [k / group_size, padded tokens]."""

    values: Tensor
    scales: Tensor
    halves: Tensor
    group_size: int

    @property
    def half(self) -> bool:
        return self.values.dtype == torch.float16


def rotate(
    x: Tensor,
    fmt: Format,
    half: bool,
    *,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    one_plus_gain: bool = False,
    epsilon: float = 1e-6,
    gate_of: Tensor | None = None,
) -> tuple[Input, Tensor | None]:
    """The input of codebook layers from x [tokens, width], in one kernel; also x + residual, where one is given.

    Args:
        residual: [tokens, width], added to x before the norm.
        gain: [width] of an RMS norm after that; ``one_plus_gain`` for norms that multiply by 1 + gain.
        gate_of: [tokens, width]: the input is silu(x) * gate_of instead.

    Raises:
        UnsupportedError: a tensor's shape, strides, dtype or device do not go with x, or a residual without a norm.
    """
    _check_input(x, residual, gain, gate_of)
    tokens, width = x.shape
    k, group = tiles.padded(width, fmt), fmt.group_size
    tokens_padded = -(-tokens // 128) * 128 if tokens > 8 else 8  # whole blocks of any launch
    values = torch.empty(tokens, k, dtype=torch.float16 if half else torch.int8, device=x.device)
    scales = torch.empty(k // group, tokens_padded, device=x.device)
    halves = scales if half else torch.empty_like(scales)
    other = gate_of if gate_of is not None else residual
    total = torch.empty_like(x) if residual is not None else None
    norm = 0 if gain is None else 2 if one_plus_gain else 1
    flags = f"{str(half).lower()}, {norm}, {str(gate_of is not None).lower()}"
    if not tokens:
        return Input(values, scales, halves, group), total
    run = nvrtc.kernel("rotate.cu", f"rotate<{group}, {_KINDS[x.dtype]}, {flags}>", x.device.index)
    run(
        (tokens, 1, 1), min(256, 32 * max(1, k // group)),
        _Rotate(
            x.data_ptr(), _address(other), _address(total), _address(gain), _signs(group, x.device).data_ptr(),
            values.data_ptr(), scales.data_ptr(), halves.data_ptr(), x.stride(0), width, k, tokens_padded, epsilon,
        ),
    )  # fmt: skip
    return Input(values, scales, halves, group), total


@dataclass(frozen=True)
class Launch:
    """How a product is spread over the card.

    Attributes:
        token_tiles: blocks of 8 tokens that a thread block multiplies.
        tiles: tiles of 32 rows in a thread block, which then reads its tokens once for all of them.
        warps: warps of a thread block, a multiple of ``tiles``; those of one tile split the input axis.
        resident: warps that a multiprocessor must hold, which bounds registers; 0 leaves them to the compiler.
    """

    token_tiles: int
    tiles: int
    warps: int
    resident: int


def choose(tokens: int, tile_count: int, units: int, bits: int) -> Launch:
    """As measured on an H200 (``benchmarks/gpu_kernels.py``): 1700 warps fill it, and fewer warps to a tile save sums."""
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 64 else 16
    if token_tiles == 4:
        return Launch(token_tiles, 2, 4, 0)
    warps = 2 if bits == 4 and token_tiles == 1 else 4
    most = 4 if token_tiles == 16 else 16  # their sums must fit in shared memory
    while warps < most and tile_count * warps < 1700 and 4 * warps <= units:
        warps *= 2
    return Launch(token_tiles, 1, warps, 0 if token_tiles > 1 or bits < 4 else 8 if bits == 4 else 16)


def linear(
    x: Input, weights: Sequence[Weight], dtype: torch.dtype, biases: Sequence[Tensor | None] | None = None,
    launch: Launch | None = None,
) -> list[Tensor]:  # fmt: skip
    """x times each weight, [tokens, rows] each, in one launch; the weights share group size and width, not bits.

    Args:
        biases: [rows] in ``dtype``, or None, for each weight.
        launch: by default as ``choose`` says.

    Raises:
        UnsupportedError: more than four weights, or widths that the input's type does not serve.
    """
    _check(x, weights)
    tokens, k = x.values.shape
    outs = [torch.empty(tokens, w.rows, dtype=dtype, device=x.values.device) for w in weights]
    if not tokens:
        return outs
    bits = [w.fmt.bits for w in weights] + [0] * (_MOST_OUTPUTS - len(weights))
    tile_counts = [w.tiled.codes.shape[0] for w in weights]
    use = launch or choose(tokens, sum(tile_counts), k // tiles.INPUTS, max(bits))
    parameters = _Linear(
        x=x.values.data_ptr(), scales=x.scales.data_ptr(), halves=x.halves.data_ptr(), tokens=tokens,
        tokens_padded=x.scales.shape[1], k=k, out_kind=_KINDS[dtype],
    )  # fmt: skip
    blocks = 0
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        parameters.segments[i] = _Segment(
            weight.tiled.codes.data_ptr(), weight.tiled.norms.data_ptr(), out.data_ptr(),
            _address(biases[i] if biases else None), weight.rows, blocks, weight.table,
        )  # fmt: skip
        blocks += -(-tile_counts[i] // use.tiles)
    flags = f"{x.group_size}, {str(x.half).lower()}, {use.token_tiles}, {use.tiles}, {use.warps}, {use.resident}"
    sums = 4 * 8 * use.token_tiles * 33 * use.warps
    table = _TABLE_BYTES.get(max(bits), 0) if x.half else 0
    instance = f"linear<{', '.join(map(str, bits))}, {flags}>"
    run = nvrtc.kernel("linear.cu", instance, x.values.device.index, sums + table)
    run((blocks, -(-tokens // (8 * use.token_tiles)), 1), 32 * use.warps, parameters)
    return outs


def _check_input(x: Tensor, residual: Tensor | None, gain: Tensor | None, gate_of: Tensor | None) -> None:
    if x.dtype not in _KINDS or x.dim() != 2 or x.stride(1) != 1:
        raise UnsupportedError(
            f"{NAME}: an input is [tokens, width] in float32, float16 or bfloat16 with neighbouring columns, "
            f"got {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )
    for name, other in (("residual", residual), ("gate_of", gate_of)):
        if other is not None and _layout(other) != _layout(x):
            raise UnsupportedError(f"{NAME}: {name} must lie as x does: {_layout(x)}, got {_layout(other)}")
    if gain is not None and _layout(gain) != (x.dtype, x.device, x.shape[1:], (1,)):
        raise UnsupportedError(f"{NAME}: gain must be {x.dtype} [{x.shape[1]}] on {x.device}, got {_layout(gain)}")
    if residual is not None and (gain is None or gate_of is not None):
        raise UnsupportedError(f"{NAME}: a residual is added before a norm; give gain, and not gate_of")
    if x.device.type != "cuda":
        raise UnsupportedError(f"{NAME}: needs an NVIDIA GPU, the input is on {x.device}")


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _check(x: Input, weights: Sequence[Weight]) -> None:
    if not 1 <= len(weights) <= _MOST_OUTPUTS:
        raise UnsupportedError(f"{NAME}: {len(weights)} weights share an input; one launch takes 1 to {_MOST_OUTPUTS}")
    mine = (x.half, x.group_size, x.values.shape[1])
    for weight in weights:
        if mine != (weight.half, weight.fmt.group_size, tiles.padded(weight.in_features, weight.fmt)):
            raise UnsupportedError(
                f"{NAME}: the input is {x.values.dtype} [{x.values.shape[1]}] in groups of {x.group_size}; a weight "
                f"[{weight.rows}, {weight.in_features}] is {weight.fmt.id}, prepared for {'float16' if weight.half else 'int8'}"
            )


@cache
def _signs(group_size: int, device: torch.device) -> Tensor:
    first, second = (torch.tensor(s, dtype=torch.float32) for s in signs(group_size))
    return torch.stack([first, second / math.sqrt(group_size)]).to(device)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def refusal(
    fmt: Format, half: bool, norm_dtype: torch.dtype, device: torch.device, codebook: Sequence[float]
) -> str | None:
    """Why a weight can not be multiplied here, or None."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, the weight is on {device}"
    if torch.version.cuda is None:
        return "needs a CUDA build of torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0, {} has {}.{}".format(
            torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device)
        )
    if not half and fmt.bits not in INT8_BITS:
        return f"int8 inputs serve {', '.join(map(str, INT8_BITS))} bits, not {fmt.bits}; float16 inputs serve all"
    if norm_dtype != torch.float16:
        return f"norms must be float16, got {norm_dtype}"
    if any(a != -b for a, b in zip(codebook, reversed(codebook), strict=True)):
        return "the codebook is not symmetric about 0"
    return nvrtc.unavailable()
