"""The encoder of ``codec`` as one kernel on NVIDIA GPUs: the same codes and norms, bit for bit.

Unlike the codec it writes nothing but its result: a weight is read once, and stays in registers for every step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat
from kappaquant.formats.search import SCALES, Nearest, nearest
from kappaquant.formats.signs import signs
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc

NAME = "cuda encoder"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as numbers.cuh counts them
_WARPS, _TILE, _CANDIDATES = 8, 512, 32  # as in encode.cu: warps of a block, weights of a warp, room for scales
_BLOCKS = 8  # of a multiprocessor: as many as can reside, each of which loads the tables once


class _Encode(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p), ("tables", ctypes.c_void_p), ("magnitudes", ctypes.c_void_p),
        ("packed", ctypes.c_void_p), ("norms", ctypes.c_void_p), ("errors", ctypes.c_void_p), ("energies", ctypes.c_void_p),
        ("count", ctypes.c_uint), ("per_row", ctypes.c_uint), ("width", ctypes.c_int), ("widths", ctypes.c_int),
        ("candidates", ctypes.c_int), ("wide_norms", ctypes.c_int), ("bits", ctypes.c_int * len(BITS)),
        ("scales", ctypes.c_float * _CANDIDATES), ("steps", ctypes.c_float * _CANDIDATES), ("signs", ctypes.c_uint * 8 * 2),
    )  # fmt: skip


nvrtc.declare("encode.cu", _Encode)


def refusal(weight: Tensor, effort: str = "fast") -> str | None:
    """Why a weight can not be encoded by this kernel, or None."""
    if weight.dtype not in DTYPES:
        return f"takes weights in float32, float16 or bfloat16, not {weight.dtype}"
    if effort not in EFFORTS:
        return f"knows efforts {', '.join(EFFORTS)}, not {effort!r}"
    if weight.numel() >= 1 << 36:
        return f"takes fewer than 2**36 weights, not {weight.numel()}"
    return gpu.refusal(weight.device)


def encode(
    weight: Tensor, fmt: CodebookFormat, effort: Effort = "best", *, name: str = "weight"
) -> codec.CodebookEncoded:
    """What ``codec.encode`` gives, whose arguments these are.

    Raises:
        NonFiniteError: as ``codec.encode``.
        UnsupportedError: see ``refusal``.
    """
    _check(refusal(weight, effort))
    shape = tuple(weight.shape)
    packed = torch.empty(fmt.packed_shape(shape), dtype=torch.uint8, device=weight.device)
    norms = torch.empty(fmt.norms_shape(shape), dtype=codec.NORMS_TORCH[fmt.norms], device=weight.device)
    energy, error = _run(weight, fmt.group_size, (fmt.codebook,), effort, packed, norms)
    if not math.isfinite(energy + error):
        return codec.encode(weight, fmt, effort, name=name)  # says what is wrong
    return codec.CodebookEncoded({PACKED_SUFFIX: packed, NORMS_SUFFIX: norms}, error, energy)


def squared_errors(
    weight: Tensor, group_size: int, bits: Iterable[int] = BITS, name: str = "weight"
) -> dict[int, float]:
    """What ``codec.squared_errors`` gives, whose arguments these are. Raises as ``encode``."""
    _check(refusal(weight))
    widths = tuple(bits)
    books = tuple(CodebookFormat(b, group_size).codebook for b in widths)
    _, *errors = _run(weight, group_size, books, "fast") if widths else (0.0,)
    if not all(map(math.isfinite, errors)):
        return codec.squared_errors(weight, group_size, widths, name)  # says what is wrong
    return dict(zip(widths, errors, strict=True))


def _check(reason: str | None) -> None:
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")


def _run(
    weight: Tensor,
    group_size: int,
    books: tuple[tuple[float, ...], ...],
    effort: Effort,
    packed: Tensor | None = None,
    norms: Tensor | None = None,
) -> list[float]:
    """Energy, and the squared error with each codebook. Not finite where the codec raises: infinity and NaN spread."""
    weight, device = weight.contiguous(), weight.device
    width = weight.shape[-1]
    per_row = -(-width // group_size)
    count = weight.numel() // width * per_row if width else 0
    sums = torch.empty(1 + len(books), count, device=device)
    tables, magnitudes = _tables(books, device)
    table = nearest(books[0], torch.device("cpu"))
    search = SCALES if effort == "best" else ()
    if count:
        blocks = min(-(-count * group_size // (_TILE * _WARPS)), _BLOCKS * _multiprocessors(device))
        run = nvrtc.kernel("encode.cu", f"encode<{group_size}, {DTYPES[weight.dtype]}>", device.index)
        run(
            (blocks, 1, 1), 32 * _WARPS,
            _Encode(
                weight.data_ptr(), tables.data_ptr(), magnitudes.data_ptr(), _address(packed), _address(norms),
                sums[1:].data_ptr(), sums.data_ptr(), count, per_row, width, len(books), len(search),
                norms is not None and norms.dtype == torch.float32, _of(ctypes.c_int, len(BITS), _bits(books)),
                _of(ctypes.c_float, _CANDIDATES, search),
                _of(ctypes.c_float, _CANDIDATES, [scale * table.fineness for scale in search]), _signs(group_size),
            ),
        )  # fmt: skip
    return sums.sum(1, dtype=torch.float64).tolist()


@cache
def _tables(books: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds and centroids of each codebook, and the first one's table for the search."""
    nears = [nearest(book, torch.device("cpu")) for book in books]
    parts = [part for near in nears for part in (thresholds(near), near.centroids)]
    return torch.cat(parts).to(device), nears[0].magnitude.to(device)


def thresholds(table: Nearest) -> Tensor:
    """The decision thresholds, ascending, and infinity. The code of y is the number of those below it."""
    return torch.cat([table.threshold[table.threshold.isfinite()], torch.tensor([math.inf])])


def _bits(books: Sequence[Sequence[float]]) -> list[int]:
    return [len(book).bit_length() - 1 for book in books]


@cache
def _signs(group_size: int) -> ctypes.Array[ctypes.Array[ctypes.c_uint]]:
    masks = [sum((s < 0) << i for i, s in enumerate(side)) for side in signs(group_size)]
    return (ctypes.c_uint * 8 * 2)(*((ctypes.c_uint * 8)(*(m >> 32 * i & 0xFFFFFFFF for i in range(8))) for m in masks))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _of(kind: type, room: int, values: Sequence[float]) -> ctypes.Array[ctypes.c_int]:
    return (kind * room)(*values)  # type: ignore[operator]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
