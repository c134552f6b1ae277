"""Few tokens times 16-bit weights as they lie in memory, several weights in one launch: what plans leave unquantized."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import nvrtc
from kappaquant.kernels.cuda.arguments import KINDS, address

NAME = "dense"
MOST_WEIGHTS = 4
_AHEAD = {1: 8, 2: 8, 4: 4}  # blocks of 32 inputs that a warp reads at once: dense.cuh


class Rows(ctypes.Structure):
    """``Rows`` of dense.cuh."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p), ("rows", ctypes.c_int),
        ("first_block", ctypes.c_int),
    )  # fmt: skip


class Tokens(ctypes.Structure):
    """``Tokens`` of dense.cuh."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("stride", ctypes.c_longlong), ("tokens", ctypes.c_int), ("inputs", ctypes.c_int),
    )  # fmt: skip


class _Dense(ctypes.Structure):
    _fields_ = (("parts", Rows * MOST_WEIGHTS), ("inputs", Tokens), ("count", ctypes.c_int))


nvrtc.declare("step/dense.cu", Rows, Tokens, _Dense)


def refusal(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> str | None:
    """Why these can not share a launch, or None; x of any number of tokens."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"inputs and weights must be float16 or bfloat16, got {x.dtype}"
    if x.dim() != 2 or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16 or x.shape[1] % 8:
        return (
            f"an input is [tokens, inputs] with neighbouring columns, a multiple of 8 of them and rows aligned to "
            f"16 bytes, got {list(x.shape)} with strides {x.stride()}"
        )
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        return f"1 to {MOST_WEIGHTS} weights share a launch, got {len(weights)}"
    for weight in weights:
        if weight.dtype != x.dtype or weight.device != x.device or not weight.is_contiguous() or weight.data_ptr() % 16:
            return f"weights must be contiguous {x.dtype} on {x.device}, got {weight.dtype} with strides {weight.stride()} on {weight.device}"
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            return f"the input is {list(x.shape)}, a weight {list(weight.shape)}"
    if biases and len(biases) != len(weights):
        return f"{len(biases)} biases for {len(weights)} weights"
    for weight, bias in zip(weights, biases, strict=False):
        if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1] or bias.device != x.device):
            return f"a bias must be {x.dtype} [{weight.shape[0]}] on {x.device}, got {bias.dtype} {list(bias.shape)}"
    return gpu.refusal(x.device)


def dense(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *, early: bool = False
) -> list[Tensor]:
    """x [M, K] times each weight [n, K], plus its bias [n]: a list of [M, n].

    Sums are float32. More than 16 tokens go to torch, and so does a lone weight where cuBLAS was measured to be faster: above
    8192 rows by 3 to 20 %, with more than 8 tokens above 2048 rows by 8 %.

    Args:
        early: start while earlier kernels run; none of them may still be writing the weights.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    reason = refusal(x, weights, biases)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    rows = sum(w.shape[0] for w in weights)
    lone = len(weights) == 1 and (rows > 8192 or (x.shape[0] > 8 and rows > 2048))
    if lone or x.shape[0] > gpu.MOST_TOKENS:
        return [
            torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)
        ]
    return launch(x, weights, biases, *tiling(rows, x.shape[1]), early)


def tiling(rows: int, inputs: int) -> tuple[int, int]:
    """(tiles of 8 rows, warps) of a block, as measured."""
    tiles = 1 if rows <= 1024 else 2
    return tiles, 16 if inputs > 2048 or tiles == 1 else 8


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tiles: int,
    warps: int,
    early: bool = False,
) -> list[Tensor]:
    """``dense`` of up to 16 tokens with blocks of that size."""
    tokens = x.shape[0]
    out = [torch.empty(tokens, w.shape[0], dtype=x.dtype, device=x.device) for w in weights]
    if not tokens:
        return out
    parameters = _Dense(inputs=Tokens(x.data_ptr(), x.stride(0), *x.shape), count=len(weights))
    blocks = place(parameters.parts, weights, biases, out, 8 * tiles)
    many = str(tokens > 8).lower()
    run = nvrtc.kernel("step/dense.cu", f"dense<{KINDS[x.dtype]}, {tiles}, {warps}, {many}>", x.device.index)
    run((blocks, 1, 1), 32 * warps, parameters, early)
    return out


def place(
    parts: ctypes.Array[Rows],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out: Sequence[Tensor],
    rows: int,
) -> int:
    """Give each weight its blocks of ``rows``; returns how many there are."""
    blocks = 0
    for i, weight in enumerate(weights):
        bias = biases[i] if biases else None
        parts[i] = Rows(weight.data_ptr(), address(bias), out[i].data_ptr(), weight.shape[0], blocks)
        blocks += -(-weight.shape[0] // rows)
    return blocks
