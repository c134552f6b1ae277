"""The encoder of ``codec`` as one kernel on NVIDIA GPUs: the same codes and norms, bit for bit.

Unlike the codec it writes nothing but its result: a weight is read once, and stays in registers for every step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import Effort
from kappaquant.formats.codebook import BITS, CodebookFormat
from kappaquant.formats.search import SCALES, Nearest, nearest
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import groups, nvrtc
from kappaquant.kernels.cuda.arguments import KINDS, address

NAME = "cuda encoder"
# as in encode.cu and groups.cuh: warps of a block, weights of a warp, room for scales
_WARPS, _TILE, _CANDIDATES = 8, 512, 32
_BLOCKS = 8  # of a multiprocessor: as many as can reside, each of which loads the tables once


class _Encode(ctypes.Structure):
    _fields_ = (
        ("groups", groups.Groups), ("tables", ctypes.c_void_p), ("magnitudes", ctypes.c_void_p),
        ("packed", ctypes.c_void_p), ("errors", ctypes.c_void_p), ("widths", ctypes.c_int), ("candidates", ctypes.c_int),
        ("bits", ctypes.c_int * len(BITS)), ("scales", ctypes.c_float * _CANDIDATES), ("steps", ctypes.c_float * _CANDIDATES),
    )  # fmt: skip


nvrtc.declare("encode.cu", _Encode, groups.Groups)


def refusal(weight: Tensor, effort: str = "fast") -> str | None:
    """Why a weight can not be encoded by this kernel, or None."""
    return groups.refusal(weight, effort)


def encode(
    weight: Tensor, fmt: CodebookFormat, effort: Effort = "best", *, name: str = "weight"
) -> codec.CodebookEncoded:
    """What ``codec.encode`` gives, whose arguments these are.

    Raises:
        NonFiniteError: as ``codec.encode``.
        UnsupportedError: see ``refusal``.
    """
    _check(refusal(weight, effort))
    return groups.encoded(partial(_run, weight, fmt.group_size, (fmt.codebook,), effort), weight, fmt, effort, name)


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
    count = groups.count(weight, group_size)
    sums = torch.empty(1 + len(books), count, device=device)
    tables, magnitudes = _tables(books, device)
    table = nearest(books[0], torch.device("cpu"))
    search = SCALES if effort == "best" else ()
    if count:
        blocks = min(-(-count * group_size // (_TILE * _WARPS)), _BLOCKS * gpu.multiprocessors(device))
        run = nvrtc.kernel("encode.cu", f"encode<{group_size}, {KINDS[weight.dtype]}>", device.index)
        run(
            (blocks, 1, 1), 32 * _WARPS,
            _Encode(
                groups.groups(weight, group_size, sums[0], norms), tables.data_ptr(), magnitudes.data_ptr(),
                address(packed), sums[1:].data_ptr(), len(books), len(search),
                _of(ctypes.c_int, len(BITS), _bits(books)), _of(ctypes.c_float, _CANDIDATES, search),
                _of(ctypes.c_float, _CANDIDATES, [scale * table.fineness for scale in search]),
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


def _of(kind: type, room: int, values: Sequence[float]) -> ctypes.Array[ctypes.c_int]:
    return (kind * room)(*values)  # type: ignore[operator]
