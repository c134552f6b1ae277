"""The encoder of ``codec`` in the native core: the same codes and norms, bit for bit, by threads of its own.

Unlike the codec it keeps a few groups in a processor's nearest cache for every step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat
from kappaquant.formats.search import SCALES, nearest
from kappaquant.kernels.cpu.library import DTYPES, absence, core, signs_of
from kappaquant.kernels.cpu.structures import Encoding

NAME = "native encoder"


def refusal(weight: Tensor, effort: str = "fast") -> str | None:
    """Why a weight can not be encoded by the native core, or None."""
    if weight.device.type != "cpu":
        return "runs on CPUs"
    if weight.dtype not in DTYPES:
        return f"takes weights in float32, bfloat16 or float16, not {weight.dtype}"
    if effort not in EFFORTS:
        return f"knows efforts {', '.join(EFFORTS)}, not {effort!r}"
    return absence() or None


def encode(
    weight: Tensor, fmt: CodebookFormat, effort: Effort = "best", *, name: str = "weight", level: str = ""
) -> codec.CodebookEncoded:
    """What ``codec.encode`` gives, whose arguments these are.

    Args:
        level: name of the instruction set; the fastest of the processor by default.

    Raises:
        NonFiniteError: as ``codec.encode``.
        UnsupportedError: see ``refusal``.
    """
    _check(refusal(weight, effort))
    shape = tuple(weight.shape)
    packed = torch.empty(fmt.packed_shape(shape), dtype=torch.uint8)
    norms = torch.empty(fmt.norms_shape(shape), dtype=codec.NORMS_TORCH[fmt.norms])
    energies, errors = _run(weight, fmt.group_size, (fmt.codebook,), effort, level, packed, norms)
    energy, error = (numbers.sum(dtype=torch.float64).item() for numbers in (energies, errors[0]))
    if not math.isfinite(energy + error):
        return codec.encode(weight, fmt, effort, name=name)  # says what is wrong
    return codec.CodebookEncoded({PACKED_SUFFIX: packed, NORMS_SUFFIX: norms}, error, energy)


def squared_errors(
    weight: Tensor, group_size: int, bits: Iterable[int] = BITS, name: str = "weight", *, level: str = ""
) -> dict[int, float]:
    """What ``codec.squared_errors`` gives, whose arguments these are. Raises as ``encode``."""
    _check(refusal(weight))
    widths = tuple(bits)
    books = tuple(CodebookFormat(b, group_size).codebook for b in widths)
    _, errors = _run(weight, group_size, books, "fast", level)
    # added up block by block as the codec does it: evidence on disk holds every digit
    found = {
        b: sum(block.sum(dtype=torch.float64).item() for block in each.split(codec.CPU_BLOCK))
        for b, each in zip(widths, errors, strict=True)
    }
    if not all(map(math.isfinite, found.values())):
        return codec.squared_errors(weight, group_size, widths, name)  # says what is wrong
    return found


def _check(reason: str | None) -> None:
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")


def _run(
    weight: Tensor,
    group_size: int,
    books: tuple[tuple[float, ...], ...],
    effort: Effort,
    level: str,
    packed: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies [groups], and squared errors [books, groups]. Not finite where the codec raises: infinity and NaN spread."""
    weight, width = weight.contiguous(), weight.shape[-1]
    per_row = -(-width // group_size)
    rows = weight.numel() // width if width else 0
    energies, errors = torch.empty(rows * per_row), torch.empty(len(books), rows * per_row)
    if errors.numel():
        book, magnitudes, scales, steps = tables(books, SCALES if effort == "best" else ())
        native = core(level)
        native.library.kq_encode(
            native.level, torch.get_num_threads(),
            ctypes.byref(Encoding(
                weight.data_ptr(), signs_of(group_size).data_ptr(), book.data_ptr(), magnitudes.data_ptr(), scales.data_ptr(),
                steps.data_ptr(), _address(packed), _address(norms), errors.data_ptr(), energies.data_ptr(), rows, width,
                per_row, DTYPES[weight.dtype], group_size, norms is not None and norms.dtype == torch.float32, len(scales),
                len(books), (ctypes.c_int32 * len(BITS))(*(len(book).bit_length() - 1 for book in books)),
            )),
        )  # fmt: skip
    return energies, errors


@cache
def tables(books: tuple[tuple[float, ...], ...], scales: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codebooks one after another; of the first one the centroids by cell; scales and their cells for each unit of magnitude."""
    table = nearest(books[0], torch.device("cpu"))
    every = torch.tensor([value for book in books for value in book], dtype=torch.float32)
    steps = torch.tensor([scale * table.fineness for scale in scales], dtype=torch.float32)
    return every, table.magnitude, torch.tensor(scales, dtype=torch.float32), steps


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
