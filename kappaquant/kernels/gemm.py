"""Codebook products of many tokens on NVIDIA Hopper GPUs: weights are decoded once for up to 256 tokens, in float16.

Nothing is scaled after the products: a weight's operand is its table entry times its group's norm, and a token has one scale.
So the error is that of float16, whatever the format: about 4e-4 of a product's size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels import gpu, nvrtc, tiles
from kappaquant.kernels.inputs import KINDS, Tokens, address
from kappaquant.kernels.tensor_cores import TABLE_BYTES, Codes, Weight

NAME = "gemm"
_MOST_OUTPUTS = 4
_UNIT_BYTES = 2 * tiles.INPUTS  # of a token
_BARRIER_BYTES = 128


class _Segment(ctypes.Structure):
    _fields_ = (
        ("weight", Codes), ("out", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("rows", ctypes.c_int),
        ("first_block", ctypes.c_int),
    )  # fmt: skip


class _Gemm(ctypes.Structure):
    _fields_ = (
        ("segments", _Segment * _MOST_OUTPUTS), ("x", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("items", ctypes.c_void_p), ("rows_of", ctypes.c_void_p), ("tokens", ctypes.c_int), ("blocks", ctypes.c_int),
        ("k", ctypes.c_int), ("out_kind", ctypes.c_int),
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """How a product is spread over the card.

    Attributes:
        tokens: of a thread block: 8, 16, 32, 64, 128 or 256.
        warpgroups: of a thread block, 128 rows each, or 64 with 256 tokens, when there are two.
        split: thread blocks of a cluster that share the input axis.
        stages: units of the input on their way to shared memory or in it.
        resident: thread blocks that a multiprocessor must hold, which bounds registers.
    """

    tokens: int
    warpgroups: int
    split: int
    stages: int
    resident: int

    @property
    def rows(self) -> int:
        """Of a thread block."""
        return (64 if self.tokens == 256 else 128) * self.warpgroups


@dataclass(frozen=True)
class Items:
    """Work of experts: each thread block multiplies the tokens of one item.

    Attributes:
        work: int32 [items, 4]: expert, first position (a multiple of 8), positions (0: none), 0.
        rows_of: int32 [positions]: the output row of each.
        rows: of the output.
    """

    work: Tensor
    rows_of: Tensor
    rows: int


def refusal(device: torch.device) -> str | None:
    """Why products can not be made here, or None."""
    reason = gpu.refusal(device)
    if reason:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"needs compute capability 9.0 (Hopper), {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def choose(tokens: int, row_count: int, units: int, multiprocessors: int) -> Launch:
    """The launch for ``tokens`` of products with ``row_count`` rows in all, as measured on an H200.

    Blocks of 256 tokens beat those of 128 by 3 to 14 % from 256 tokens on. Splitting the input axis until the card is full
    takes three quarters off the time of 2048 x 4096 at 16 to 128 tokens, a third at 512; a step further loses.
    """
    block = next((n for n in (16, 32, 64, 128) if tokens <= n), 256)
    use = Launch(block, 2, 1, 3 if block == 256 else 4, 2 if block == 16 else 1)
    blocks, split = -(-row_count // use.rows) * -(-tokens // block), 1
    while split < 8 and 2 * split * blocks <= multiprocessors * use.resident and 4 * split <= units:
        split *= 2
    return replace(use, split=split)


def linear(
    x: Tokens, weights: Sequence[Weight], dtype: torch.dtype, biases: Sequence[Tensor | None] | None = None,
    launch: Launch | None = None, items: Items | None = None,
) -> list[Tensor]:  # fmt: skip
    """x times each weight, [tokens, rows] each, in one launch; the weights share group size and width, not bits.

    Args:
        biases: [rows] in ``dtype``, or None, for each weight.
        launch: by default as ``choose`` says.
        items: for weights of experts [E, rows, in_features]: which positions of x meet which expert.

    Raises:
        UnsupportedError: more than four weights, widths that the input does not have, or no Hopper GPU.
    """
    _check(x, weights, items)
    device, units = x.values.device, x.values.shape[0]
    count = items.rows if items else x.count
    outs = [torch.empty(count, w.rows, dtype=dtype, device=device) for w in weights]
    if not count:
        return outs
    use = launch or choose(x.count, sum(w.rows for w in weights), units, _multiprocessors(device))
    parameters = _Gemm(
        x=x.values.data_ptr(), scales=x.scales.data_ptr(), items=address(items.work if items else None),
        rows_of=address(items.rows_of if items else None), tokens=x.count, blocks=x.values.shape[1],
        k=units * tiles.INPUTS, out_kind=KINDS[dtype],
    )  # fmt: skip
    blocks = 0
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        bias = address(biases[i] if biases else None)
        parameters.segments[i] = _Segment(weight.parameters(True), out.data_ptr(), bias, weight.rows, blocks)
        blocks += -(-weight.rows // use.rows)
    bits = [w.fmt.bits for w in weights] + [0] * (_MOST_OUTPUTS - len(weights))
    flags = f"{use.tokens}, {use.warpgroups}, {use.split}, {use.stages}, {use.resident}"
    instance = f"gemm<{', '.join(map(str, bits))}, {x.group_size}, {str(items is not None).lower()}, {flags}>"
    run = nvrtc.kernel("gemm.cu", instance, device.index, shared_bytes(use, max(bits)))
    work = items.work.shape[0] if items else -(-x.count // use.tokens)
    run((blocks * use.split, work, 1), 128 * use.warpgroups, parameters, early=True)
    return outs


def shared_bytes(launch: Launch, bits: int) -> int:
    """Shared memory of a thread block whose widest codes have ``bits``."""
    inputs = launch.stages * launch.tokens * _UNIT_BYTES
    sums = 4 * launch.tokens * (launch.rows + 4)
    return _BARRIER_BYTES + TABLE_BYTES.get(bits, 0) + max(inputs, sums)


def _check(x: Tokens, weights: Sequence[Weight], items: Items | None) -> None:
    reason = refusal(x.values.device)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    if not 1 <= len(weights) <= _MOST_OUTPUTS:
        raise UnsupportedError(f"{NAME}: {len(weights)} weights share an input; one launch takes 1 to {_MOST_OUTPUTS}")
    k = x.values.shape[0] * tiles.INPUTS
    for weight in weights:
        if (x.group_size, k) != (weight.fmt.group_size, tiles.padded(weight.in_features, weight.fmt)):
            raise UnsupportedError(
                f"{NAME}: the input is [{k}] in groups of {x.group_size}; a weight [{weight.rows}, {weight.in_features}] "
                f"is {weight.fmt.id}"
            )
        experts = weight.tiled.codes.dim() == 6
        if experts != (items is not None):
            raise UnsupportedError(f"{NAME}: weights of experts need items, and others take none")


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
