"""Calibrated rounding of a group in the native core, without an array for every input.

Of codebooks codes, norms and errors are those of ``quantizing.rounding.groups``, bit for bit. Of trellis codes norms are tried as
``quantizing.rounding.rings`` does it, and paths differ from its own where sums that are rounded otherwise come out equally good.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels.cpu.library import absence, core
from kappaquant.kernels.cpu.structures import Encoding, Feedback
from kappaquant.kernels.cpu.tables import tables, unfit

NAME = "native feedback"


def refusal(block: Tensor, fmt: GroupedFormat | None = None) -> str | None:
    """Why a group [B, size, N] can not be rounded by the native core, or None; ``fmt`` matters where it is a trellis code."""
    if block.device.type != "cpu":
        return "runs on CPUs"
    if block.dtype != torch.float32:
        return f"takes float32, not {block.dtype}"
    if block.shape[1] not in GROUP_SIZES:
        return f"takes groups of {', '.join(map(str, GROUP_SIZES))}, not {block.shape[1]}"
    if isinstance(fmt, TrellisFormat) and (reason := unfit(fmt.code)):
        return reason
    return absence() or None


def choose(
    block: Tensor, upper: Tensor, scales: Sequence[float], fmt: GroupedFormat, *, level: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``groups.choose`` gives, or ``rings.choose`` of trellis codes, whose arguments these are.

    Args:
        level: name of the instruction set; the fastest of the processor by default.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    _check(refusal(block, fmt))
    norms = torch.empty(len(block), block.shape[2])
    codes, errors = torch.empty(block.shape, dtype=torch.uint8), torch.empty(block.shape)
    _run(block, None, upper, None, torch.tensor(scales, dtype=torch.float32), norms, codes, None, errors, fmt, level)
    return codes, norms, errors


def descend(
    left: Tensor, values: Tensor, norms: Tensor, gram: Tensor, inverses: Tensor, fmt: CodebookFormat, *, level: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``groups.descend`` gives, whose arguments these are. Level and raises as ``choose``."""
    _check(refusal(left))
    codes, found, changes = torch.empty(left.shape, dtype=torch.uint8), torch.empty(left.shape), torch.empty(left.shape)
    _run(left, values, gram, inverses.contiguous(), None, norms.contiguous(), codes, found, changes, fmt, level)
    return codes, found, changes


def _check(reason: str | None) -> None:
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")


def _run(
    first: Tensor,
    now: Tensor | None,
    across: Tensor,
    inverses: Tensor | None,
    scales: Tensor | None,
    norms: Tensor,
    codes: Tensor,
    values: Tensor | None,
    spread: Tensor,
    fmt: GroupedFormat,
    level: str,
) -> None:
    if not first.numel():
        return
    first, now, across = _of_whole_inputs(first), None if now is None else _of_whole_inputs(now), across.mT.contiguous()
    places = [
        tensor.data_ptr() if tensor is not None else None for tensor in (inverses, scales, norms, codes, values, spread)
    ]
    native = core(level)
    native.library.kq_feedback(
        native.level, torch.get_num_threads(),
        ctypes.byref(Encoding(
            group=fmt.group_size, wide_norms=fmt.norms == "F32", count=1, bits=(ctypes.c_int32 * 7)(fmt.bits),
            **tables(fmt, now is None).told,
        )),
        ctypes.byref(Feedback(
            first.data_ptr(), None if now is None else now.data_ptr(), across.data_ptr(), *places, len(first), first.shape[2],
            first.stride(0), 0 if now is None else now.stride(0), 0 if scales is None else len(scales),
        )),
    )  # fmt: skip


def _of_whole_inputs(x: Tensor) -> Tensor:
    """x [B, size, N] whose inputs lie one after another, in matrices that may be parts of larger ones; a copy where they do not."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
