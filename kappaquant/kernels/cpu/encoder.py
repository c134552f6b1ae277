"""The encoder of ``codec`` in the native core, codebooks and trellis codes: the same codes and norms, bit for bit, by threads of its own.

Unlike the codec it keeps a few groups in a processor's nearest cache for every step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels.cpu.library import DTYPES, absence, core, signs_of
from kappaquant.kernels.cpu.structures import Encoding
from kappaquant.kernels.cpu.tables import Tables, of_codebooks, tables, unfit

NAME = "native encoder"


def refusal(weight: Tensor, effort: str = "fast", fmt: GroupedFormat | None = None) -> str | None:
    """Why a weight can not be encoded by the native core, or None; ``fmt`` matters where it is a trellis code."""
    if weight.device.type != "cpu":
        return "runs on CPUs"
    if weight.dtype not in DTYPES:
        return f"takes weights in float32, bfloat16 or float16, not {weight.dtype}"
    if effort not in EFFORTS:
        return f"knows efforts {', '.join(EFFORTS)}, not {effort!r}"
    if isinstance(fmt, TrellisFormat) and (reason := unfit(fmt.code)):
        return reason
    return absence() or None


def encode(
    weight: Tensor, fmt: GroupedFormat, effort: Effort = "best", *, name: str = "weight", level: str = ""
) -> codec.CodebookEncoded:
    """What ``codec.encode`` gives, whose arguments these are.

    Args:
        level: name of the instruction set; the fastest of the processor by default.

    Raises:
        NonFiniteError: as ``codec.encode``.
        UnsupportedError: see ``refusal``.
    """
    _check(refusal(weight, effort, fmt))
    shape = tuple(weight.shape)
    packed = torch.empty(fmt.packed_shape(shape), dtype=torch.uint8)
    norms = torch.empty(fmt.norms_shape(shape), dtype=codec.NORMS_TORCH[fmt.norms])
    energies, errors = _run(weight, fmt.group_size, (fmt.bits,), tables(fmt, effort == "best"), level, packed, norms)
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
    if not widths:
        return {}
    books = tuple(CodebookFormat(b, group_size).codebook for b in widths)
    _, errors = _run(weight, group_size, widths, of_codebooks(books), level)
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
    bits: tuple[int, ...],
    of: Tables,
    level: str,
    packed: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies [groups], and squared errors [books, groups]. Not finite where the codec raises: infinity and NaN spread."""
    weight, width = weight.contiguous(), weight.shape[-1]
    per_row = -(-width // group_size)
    rows = weight.numel() // width if width else 0
    energies, errors = torch.empty(rows * per_row), torch.empty(len(bits), rows * per_row)
    if errors.numel():
        native = core(level)
        native.library.kq_encode(
            native.level, torch.get_num_threads(),
            ctypes.byref(Encoding(
                weight=weight.data_ptr(), signs=signs_of(group_size).data_ptr(), packed=_address(packed), norms=_address(norms),
                errors=errors.data_ptr(), energies=energies.data_ptr(), rows=rows, width=width, groups=per_row,
                dtype=DTYPES[weight.dtype], group=group_size, wide_norms=norms is not None and norms.dtype == torch.float32,
                count=len(bits), bits=(ctypes.c_int32 * len(BITS))(*bits), **of.told,
            )),
        )  # fmt: skip
    return energies, errors


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
