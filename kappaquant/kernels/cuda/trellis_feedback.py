"""``quantizing.rounding.rings`` as two kernels on NVIDIA GPUs, norms and codes, where torch launches dozens for each input of a group."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec, trials, viterbi
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import SUBSETS, TRELLIS, TrellisFormat
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc
from kappaquant.kernels.cuda.trellis_encoder import RINGS, Trials

NAME = "cuda trellis feedback"
_CHOICES = 8  # as in trellis_search.cuh
# of a group size the inputs whose errors move with survivors, and the most warps of a thread block: longer blocks take more registers,
# of which there are enough where targets leave room for few warps
_BLOCK_AND_WARPS = {32: (12, 16), 64: (12, 16), 128: (24, 8), 256: (24, 8)}
_RESERVED = 1 << 10  # bytes of shared memory that CUDA takes for a thread block
_BOTH = ctypes.c_float * _CHOICES * 2


class _Levels(ctypes.Structure):
    _fields_ = (("values", _BOTH), ("middles", _BOTH), ("lower", ctypes.c_uint), ("upper", ctypes.c_uint))


class _TrellisFeedback(ctypes.Structure):
    _fields_ = (
        ("block", ctypes.c_void_p), ("upper", ctypes.c_void_p), ("lines", ctypes.c_void_p), ("norms", ctypes.c_void_p),
        ("codes", ctypes.c_void_p), ("errors", ctypes.c_void_p), ("block_matrix", ctypes.c_longlong),
        ("upper_matrix", ctypes.c_longlong), ("upper_row", ctypes.c_int), ("matrices", ctypes.c_int), ("rows", ctypes.c_int),
        ("tried", ctypes.c_int), ("levels", _Levels),
    )  # fmt: skip


class _TrellisNorms(ctypes.Structure):
    _fields_ = (
        ("block", ctypes.c_void_p), ("norms", ctypes.c_void_p), ("levels", ctypes.c_void_p), ("block_matrix", ctypes.c_longlong),
        ("matrices", ctypes.c_int), ("rows", ctypes.c_int), ("trials", Trials),
    )  # fmt: skip


nvrtc.declare("trellis_feedback.cu", _Levels, _TrellisFeedback)
nvrtc.declare("trellis_norms.cu", Trials, _TrellisNorms)


def refusal(block: Tensor, fmt: TrellisFormat) -> str | None:
    """Why a group [B, size, N] can not be rounded by these kernels, or None."""
    if block.dtype != torch.float32:
        return f"takes float32, not {block.dtype}"
    if block.shape[1] not in GROUP_SIZES:
        return f"takes groups of {', '.join(map(str, GROUP_SIZES))}, not {block.shape[1]}"
    if fmt.code != TRELLIS:
        return f"searches {TRELLIS}, not {fmt.code}"
    if fmt.codebook != tuple(-level for level in reversed(fmt.codebook)):
        return "takes levels that are symmetric about 0"
    return gpu.refusal(block.device)


def choose(block: Tensor, upper: Tensor, scales: Sequence[float], fmt: TrellisFormat) -> tuple[Tensor, Tensor, Tensor]:
    """What ``rings.choose`` gives, whose arguments these are.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    norms = trials.multiples(plain_norms(block, fmt), scales, fmt)
    codes, errors = feed(block, norms, upper, fmt)
    return trials.kept(codes, norms, errors)


def plain_norms(block: Tensor, fmt: TrellisFormat) -> Tensor:
    """Each row's least-squares norm at the scale that explains most of it, float32 [B, N]; see ``trials.tried_norms``.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    _check(block, fmt)
    block = _of_whole_inputs(block)
    matrices, size, rows = block.shape
    norms = torch.empty(matrices, rows, device=block.device)
    if norms.numel():
        run = nvrtc.kernel("trellis_norms.cu", f"trellis_norms<{size}, {fmt.bits}>", block.device.index)
        levels = codec.centroids(fmt, block.device)
        run(
            (-(-norms.numel() // RINGS), 1, 1), 32,
            _TrellisNorms(
                block.data_ptr(), norms.data_ptr(), levels.data_ptr(), block.stride(0), matrices, rows, Trials.of("best")
            ),
        )  # fmt: skip
    return norms


def feed(block: Tensor, norms: Tensor, upper: Tensor, fmt: TrellisFormat) -> tuple[Tensor, Tensor]:
    """What ``rings.feed`` gives, whose arguments these are.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    _check(block, fmt)
    block, norms = _of_whole_inputs(block), norms.contiguous()
    upper = upper if upper.stride(2) == 1 else upper.contiguous()
    tried, matrices, rows = norms.shape
    size, device = block.shape[1], block.device
    codes = torch.empty(size, tried, matrices, rows, dtype=torch.uint8, device=device)
    errors = torch.empty(size, tried, matrices, rows, device=device)
    if norms.numel():
        lines = upper.mT.contiguous()
        lines.diagonal(dim1=1, dim2=2).reciprocal_()
        warps, shared = _room(size, device)
        run = nvrtc.kernel("trellis_feedback.cu", instance(fmt), device.index, shared)
        run(
            (-(-tried * rows // warps), matrices, 1), 32 * warps,
            _TrellisFeedback(
                block.data_ptr(), upper.data_ptr(), lines.data_ptr(), norms.data_ptr(), codes.data_ptr(), errors.data_ptr(),
                block.stride(0), upper.stride(0), upper.stride(1), matrices, rows, tried, _levels(fmt.codebook),
            ),
        )  # fmt: skip
    return codes, errors


def instance(fmt: TrellisFormat) -> str:
    """Of the kernel's template in trellis_feedback.cu."""
    block, warps = _BLOCK_AND_WARPS[fmt.group_size]
    return f"trellis_feedback<{fmt.bits}, {fmt.group_size}, {block}, {warps}>"


def _check(block: Tensor, fmt: TrellisFormat) -> None:
    if reason := refusal(block, fmt):
        raise UnsupportedError(f"{NAME}: {reason}")


def _of_whole_inputs(block: Tensor) -> Tensor:
    """block [B, size, N] whose inputs lie one after another, in matrices that may be parts of larger ones; a copy where they do not."""
    return block if block.stride()[1:] == (block.shape[2], 1) else block.contiguous()


@cache
def _room(size: int, device: torch.device) -> tuple[int, int]:
    """(warps, bytes of shared memory) of a thread block: as many as there is room for what survivors aim at."""
    block, most = _BLOCK_AND_WARPS[size]
    each, together = 4 * ((size - block) * TRELLIS.states + 3 * size), 4 * size * block
    memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - _RESERVED
    warps = min(most, (memory - together) // each)
    return warps, together + warps * each


@cache
def _levels(levels: tuple[float, ...]) -> _Levels:
    """Of subsets 0 and 2 the levels and the middles between them, and the trellis."""
    values, middles = _BOTH(), _BOTH()
    table = torch.tensor(levels, dtype=torch.float32)
    for side, subset in enumerate((0, 2)):
        own = table[subset::SUBSETS]
        values[side][: len(own)] = own.tolist()
        middles[side][: len(own) - 1] = ((own[1:] + own[:-1]) / 2).tolist()
    low, _ = viterbi.branches(TRELLIS, torch.device("cpu"))
    subsets = low[::2].tolist()  # of the steps from each state whose oldest bit is 0, with path bit 0
    lower, upper = (sum((subset >> bit & 1) << state for state, subset in enumerate(subsets)) for bit in (0, 1))
    return _Levels(values, middles, lower, upper)
