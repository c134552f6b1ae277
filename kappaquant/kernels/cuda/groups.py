"""What encoders on NVIDIA GPUs have in common (groups.cuh): which weights they take, and what they are told of their groups."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, GroupedFormat
from kappaquant.formats.signs import signs
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda.arguments import KINDS, address


class Groups(ctypes.Structure):
    """Groups of one weight."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("norms", ctypes.c_void_p), ("energies", ctypes.c_void_p),
        ("count", ctypes.c_uint), ("per_row", ctypes.c_uint), ("width", ctypes.c_int), ("wide_norms", ctypes.c_int),
        ("signs", ctypes.c_uint * 8 * 2),
    )  # fmt: skip


def refusal(weight: Tensor, effort: str) -> str | None:
    """Why a weight can not be encoded by a kernel, or None."""
    if weight.dtype not in KINDS:
        return f"takes weights in float32, float16 or bfloat16, not {weight.dtype}"
    if effort not in EFFORTS:
        return f"knows efforts {', '.join(EFFORTS)}, not {effort!r}"
    if weight.numel() >= 1 << 36:
        return f"takes fewer than 2**36 weights, not {weight.numel()}"
    return gpu.refusal(weight.device)


def count(weight: Tensor, group_size: int) -> int:
    """How many groups a weight [..., in] has."""
    width = weight.shape[-1]
    return weight.numel() // width * -(-width // group_size) if width else 0


def groups(weight: Tensor, group_size: int, energies: Tensor, norms: Tensor | None = None) -> Groups:
    """Those of a weight that is contiguous and not empty; where their energies go, float32, and their norms."""
    width = weight.shape[-1]
    return Groups(
        weight.data_ptr(), address(norms), energies.data_ptr(), count(weight, group_size), -(-width // group_size), width,
        norms is not None and norms.dtype == torch.float32, _signs(group_size),
    )  # fmt: skip


def encoded(
    run: Callable[[Tensor, Tensor], list[float]], weight: Tensor, fmt: GroupedFormat, effort: Effort, name: str
) -> codec.CodebookEncoded:
    """What a kernel makes of a weight.

    Args:
        run: fills packed codes and norms, and returns energy and squared error; not finite where the codec raises.

    Raises:
        NonFiniteError: as ``codec.encode``.
    """
    shape = tuple(weight.shape)
    packed = torch.empty(fmt.packed_shape(shape), dtype=torch.uint8, device=weight.device)
    norms = torch.empty(fmt.norms_shape(shape), dtype=codec.NORMS_TORCH[fmt.norms], device=weight.device)
    energy, error = run(packed, norms)
    if not math.isfinite(energy + error):
        return codec.encode(weight, fmt, effort, name=name)  # says what is wrong
    return codec.CodebookEncoded({PACKED_SUFFIX: packed, NORMS_SUFFIX: norms}, error, energy)


@cache
def _signs(group_size: int) -> ctypes.Array[ctypes.Array[ctypes.c_uint]]:
    masks = [sum((s < 0) << i for i, s in enumerate(side)) for side in signs(group_size)]
    return (ctypes.c_uint * 8 * 2)(*((ctypes.c_uint * 8)(*(m >> 32 * i & 0xFFFFFFFF for i in range(8))) for m in masks))
