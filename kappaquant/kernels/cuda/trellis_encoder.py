"""The encoder of ``codec`` for trellis codes as one kernel on NVIDIA GPUs: the same codes and norms, bit for bit."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec, viterbi
from kappaquant.formats.base import Effort
from kappaquant.formats.trellis import TRELLIS, TrellisFormat
from kappaquant.kernels.cuda import groups, nvrtc
from kappaquant.kernels.cuda.arguments import KINDS

NAME = "cuda trellis encoder"
RINGS, _TRIALS = 8, 4  # as in trellis_rings.cuh: rings of a block, room for scales


class Trials(ctypes.Structure):
    """``Trials`` of trellis_rings.cuh."""

    _fields_ = (
        ("count", ctypes.c_int), ("scales", ctypes.c_float * _TRIALS), ("squares", ctypes.c_float * _TRIALS),
    )  # fmt: skip

    @classmethod
    def of(cls, effort: Effort) -> Trials:
        """The scales that an effort tries."""
        tried = viterbi.SCALES if effort == "best" else ()
        room = ctypes.c_float * _TRIALS
        return cls(len(tried), room(*tried), room(*(scale * scale for scale in tried)))


class _TrellisEncode(ctypes.Structure):
    _fields_ = (
        ("groups", groups.Groups), ("levels", ctypes.c_void_p), ("packed", ctypes.c_void_p), ("errors", ctypes.c_void_p),
        ("trials", Trials),
    )  # fmt: skip


nvrtc.declare("trellis_encode.cu", _TrellisEncode, groups.Groups, Trials)


def refusal(weight: Tensor, effort: str, fmt: TrellisFormat) -> str | None:
    """Why a weight can not be encoded by this kernel, or None."""
    if fmt.code != TRELLIS:
        return f"searches {TRELLIS}, not {fmt.code}"
    return groups.refusal(weight, effort)


def encode(
    weight: Tensor, fmt: TrellisFormat, effort: Effort = "best", *, name: str = "weight"
) -> codec.CodebookEncoded:
    """What ``codec.encode`` gives, whose arguments these are.

    Raises:
        NonFiniteError: as ``codec.encode``.
        UnsupportedError: see ``refusal``.
    """
    if reason := refusal(weight, effort, fmt):
        raise UnsupportedError(f"{NAME}: {reason}")
    return groups.encoded(partial(_run, weight, fmt, effort), weight, fmt, effort, name)


def _run(weight: Tensor, fmt: TrellisFormat, effort: Effort, packed: Tensor, norms: Tensor) -> list[float]:
    """Energy and squared error."""
    weight, device = weight.contiguous(), weight.device
    count = groups.count(weight, fmt.group_size)
    sums = torch.empty(2, count, device=device)
    if count:
        instance = f"trellis_encode<{fmt.group_size}, {fmt.bits}, {KINDS[weight.dtype]}>"
        nvrtc.kernel("trellis_encode.cu", instance, device.index)(
            (-(-count // RINGS), 1, 1), 32,
            _TrellisEncode(
                groups.groups(weight, fmt.group_size, sums[0], norms), codec.centroids(fmt, device).data_ptr(), packed.data_ptr(),
                sums[1].data_ptr(), Trials.of(effort),
            ),
        )  # fmt: skip
    return sums.sum(1, dtype=torch.float64).tolist()
