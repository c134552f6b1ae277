"""Weights decoded to bfloat16 on NVIDIA GPUs, for products of very many tokens by cuBLAS: a piece at a time, never kept."""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.signs import signs
from kappaquant.kernels.cuda import nvrtc, tiles
from kappaquant.kernels.cuda.tensor_cores import Codes, Weight, numbers, table_bytes

NAME = "decoded"
_PIECE_BYTES = 1 << 28  # of decoded weight alive at once


class _Decoded(ctypes.Structure):
    _fields_ = (
        ("weight", Codes), ("out", ctypes.c_void_p), ("first_tile", ctypes.c_int), ("rows", ctypes.c_int),
        ("width", ctypes.c_int), ("k", ctypes.c_int), ("scale", ctypes.c_float),
        ("s1", ctypes.c_uint32 * 8), ("s2", ctypes.c_uint32 * 8),
    )  # fmt: skip


nvrtc.declare("decoded.cu", _Decoded, Codes)


def decode(weight: Weight, first: int = 0, rows: int | None = None) -> Tensor:
    """Rows ``first`` (a multiple of 32) and up of a weight [n, in_features], in bfloat16 [rows, in_features].

    Raises:
        UnsupportedError: the weight has no such rows.
    """
    rows = weight.rows - first if rows is None else rows
    if first % tiles.ROWS or not 0 <= first < first + rows <= weight.rows:
        raise UnsupportedError(
            f"{NAME}: rows {first} to {first + rows} of {weight.rows}: must begin at a multiple of {tiles.ROWS}, in the weight"
        )
    codes, group = weight.tiled.codes, weight.fmt.group_size
    units = codes.shape[-4]
    out = torch.empty(rows, weight.in_features, dtype=torch.bfloat16, device=codes.device)
    parameters = _Decoded(
        weight.parameters(True), out.data_ptr(), first // tiles.ROWS, rows, weight.in_features,
        units * tiles.INPUTS,
    )  # fmt: skip
    parameters.scale = parameters.weight.table.scale / math.sqrt(group)
    for into, which in zip((parameters.s1, parameters.s2), signs(group), strict=True):
        for i, sign in enumerate(which):
            into[i // 32] |= (sign > 0) << i % 32
    instance = f"decoded<{numbers([weight], 1)[0]}, {group}>"
    run = nvrtc.kernel("decoded.cu", instance, codes.device.index, table_bytes([weight], True))
    a_warp = max(1, group // tiles.INPUTS)  # units
    run((-(-rows // tiles.ROWS), -(-units // (4 * a_warp)), 1), 128, parameters)
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [m, in_features], not rotated, times a weight [n, in_features], plus a bias [n]: [m, n] in x's dtype."""
    step = max(1, _PIECE_BYTES // (2 * tiles.ROWS * weight.in_features)) * tiles.ROWS
    narrow = x.to(torch.bfloat16)
    outs = [
        F.linear(narrow, decode(weight, first, min(step, weight.rows - first))) for first in range(0, weight.rows, step)
    ]
    y = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)).to(x.dtype)
    return y if bias is None else y + bias
