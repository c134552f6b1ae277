"""``quantizing.rounding.groups`` as one kernel on NVIDIA GPUs, where torch launches a dozen for each input of a group."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec, trials
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.search import nearest
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc
from kappaquant.kernels.cuda.encoder import thresholds

NAME = "cuda feedback"
_WARPS = 8  # as in feedback.cu


class _Feedback(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_void_p), ("now", ctypes.c_void_p), ("across", ctypes.c_void_p), ("inverses", ctypes.c_void_p),
        ("norms", ctypes.c_void_p), ("tables", ctypes.c_void_p), ("codes", ctypes.c_void_p), ("spread", ctypes.c_void_p),
        ("first_matrix", ctypes.c_longlong), ("now_matrix", ctypes.c_longlong), ("across_matrix", ctypes.c_longlong),
        ("inverses_matrix", ctypes.c_longlong), ("across_row", ctypes.c_int), ("matrices", ctypes.c_int),
        ("rows", ctypes.c_int), ("tried", ctypes.c_int),
    )  # fmt: skip


nvrtc.declare("feedback.cu", _Feedback)


def refusal(block: Tensor) -> str | None:
    """Why a group [B, size, N] can not be rounded by this kernel, or None."""
    if block.dtype != torch.float32:
        return f"takes float32, not {block.dtype}"
    if block.shape[1] % 32:
        return f"takes groups of whole warps, not {block.shape[1]}"
    return gpu.refusal(block.device)


def choose(block: Tensor, upper: Tensor, scales: Sequence[float], fmt: CodebookFormat) -> tuple[Tensor, Tensor, Tensor]:
    """What ``groups.choose`` gives, whose arguments these are.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    _check(block)
    norms = trials.tried_norms(block, scales, fmt)
    codes, errors = feed(block, norms, upper, fmt)
    return trials.kept(codes, norms, errors)


def feed(block: Tensor, norms: Tensor, upper: Tensor, fmt: CodebookFormat) -> tuple[Tensor, Tensor]:
    """What ``groups.feed`` gives, whose arguments these are.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    return _run(block, None, upper, None, norms, fmt)


def descend(
    left: Tensor, values: Tensor, norms: Tensor, gram: Tensor, inverses: Tensor, fmt: CodebookFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``groups.descend`` gives, whose arguments these are.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    codes, changes = (x.squeeze(1).transpose(0, 1) for x in _run(left, values, gram, inverses, norms[None], fmt))
    return codes, codec.centroids(fmt, codes.device)[codes.int()] * norms[:, None], changes


def _check(block: Tensor) -> None:
    if reason := refusal(block):
        raise UnsupportedError(f"{NAME}: {reason}")


def _run(
    first: Tensor, now: Tensor | None, across: Tensor, inverses: Tensor | None, norms: Tensor, fmt: CodebookFormat
) -> tuple[Tensor, Tensor]:
    _check(first)
    norms = norms.contiguous()
    tried, matrices, rows = norms.shape
    size, device = first.shape[1], first.device
    first, across = _dense_from(first, 1), _dense_from(across, 2)
    now = None if now is None else _dense_from(now, 1)
    inverses = None if inverses is None else _dense_from(inverses, 1)
    codes = torch.empty(size, tried, matrices, rows, dtype=torch.uint8, device=device)
    spread = torch.empty(size, tried, matrices, rows, device=device)
    if norms.numel():
        again = "false" if now is None else "true"
        run = nvrtc.kernel("feedback.cu", f"feedback<{fmt.bits}, {size}, {again}>", device.index)
        run(
            (-(-norms.numel() // _WARPS), 1, 1), 32 * _WARPS,
            _Feedback(
                first.data_ptr(), *(None if x is None else x.data_ptr() for x in (now, across, inverses)), norms.data_ptr(),
                _tables(fmt.codebook, device).data_ptr(), codes.data_ptr(), spread.data_ptr(),
                *(0 if x is None else x.stride(0) for x in (first, now, across, inverses)),
                across.stride(1), matrices, rows, tried,
            ),
        )  # fmt: skip
    return codes, spread


def _dense_from(x: Tensor, axis: int) -> Tensor:
    """x where the axes from one on lie one after another, as the kernel reads them; a copy where they do not."""
    wanted = torch.empty(x.shape[axis:], device="meta").stride()
    return x if x.stride()[axis:] == wanted else x.contiguous()


@cache
def _tables(codebook: tuple[float, ...], device: torch.device) -> Tensor:
    table = nearest(codebook, torch.device("cpu"))
    return torch.cat([thresholds(table), table.centroids]).to(device)
