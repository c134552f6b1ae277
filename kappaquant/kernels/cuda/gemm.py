"""Products of many tokens on NVIDIA Hopper GPUs: weights are decoded once for up to 256 tokens.

float16 inputs serve all widths. Nothing is scaled after their products: a weight's operand is its table entry times its
group's norm, and a token has one scale. So the error is that of float16, whatever the format: about 4e-4 of a product's size.
int8 inputs serve 2 to 5 bits (int8_gemm.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import int8_gemm, nvrtc, tiles
from kappaquant.kernels.cuda.arguments import KINDS, address
from kappaquant.kernels.cuda.inputs import Tokens
from kappaquant.kernels.cuda.launches import BARRIER_BYTES, TARGET_BYTES, Items, Spread, split_of, whole_blocks
from kappaquant.kernels.cuda.tensor_cores import MOST_OUTPUTS, Codes, Segment, Weight, check, numbers, table_bytes

NAME = "gemm"


class _Gemm(ctypes.Structure):
    _fields_ = (
        ("segments", Segment * MOST_OUTPUTS), ("x", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("items", ctypes.c_void_p), ("rows_of", ctypes.c_void_p), ("tokens", ctypes.c_int), ("blocks", ctypes.c_int),
        ("k", ctypes.c_int), ("out_kind", ctypes.c_int), ("whole", ctypes.c_int), ("row_blocks", ctypes.c_int),
        ("token_blocks", ctypes.c_int),
    )  # fmt: skip


for _file in ("gemm.cu", "int8_gemm.cu"):
    nvrtc.declare(_file, Segment, _Gemm, Codes)


@dataclass(frozen=True)
class Launch(Spread):
    """A launch of float16 inputs: 8, 16, 32, 64, 128 or 256 ``tokens``; a warpgroup has 128 rows, or 64 with 256 tokens."""

    file = "gemm.cu"
    half = True

    @property
    def rows(self) -> int:
        """Of a thread block."""
        return (64 if self.tokens == 256 else 128) * self.warpgroups

    @property
    def paired(self) -> bool:
        return self.tokens == 256 and self.split == 2

    def instance(self, formats: Sequence[int], group_size: int, items: bool = False) -> str:
        """Of the kernel template, for outputs of these formats (``tensor_cores.numbers``)."""
        flags = f"{self.tokens}, {self.warpgroups}, {self.split}, {self.stages}, {self.resident}"
        return f"gemm<{', '.join(map(str, formats))}, {group_size}, {str(items).lower()}, {flags}>"

    def shared_bytes(self, group_size: int) -> int:
        """Shared memory of a thread block, but for a table."""
        staged = self.stages * self.tokens * 2 * tiles.INPUTS
        sums = 4 * self.tokens * (self.rows + 4)
        return BARRIER_BYTES + TARGET_BYTES * self.tokens + max(staged, sums)


@cache
def refusal(device: torch.device) -> str | None:
    """Why products can not be made here, or None."""
    reason = gpu.refusal(device)
    if reason:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"needs compute capability 9.0 (Hopper), {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


@cache
def choose(tokens: int, row_count: int, units: int, multiprocessors: int) -> Launch:
    """The launch of float16 inputs for ``tokens`` of products with ``row_count`` rows in all, as measured on an H200.

    Blocks of 256 tokens beat those of 128 by 3 to 14 % from 256 tokens on. Few rows want small blocks: at 32 to 128 tokens
    8192 x 2048 takes two thirds of the time with 128 rows in a block that it takes with 256. With 256 tokens a pair of blocks that
    fetch inputs for each other takes 6 % less at 512 tokens than blocks on their own (an H100).
    """
    block = next((n for n in (16, 32, 64, 128) if tokens <= n), 256)
    if block <= 128 and row_count < 128 * multiprocessors:
        use = Launch(block, 1, 1, 3 if block == 128 else 4, 1 if block == 128 else 2)
    else:
        use = Launch(block, 2, 1, 3 if block == 256 else 4, 2 if block == 16 else 1)
    blocks = -(-row_count // use.rows) * -(-tokens // block)
    split = split_of(blocks, units, multiprocessors, use.resident)
    return replace(use, split=max(2, split) if block == 256 else split)


def linear(
    x: Tokens, weights: Sequence[Weight], dtype: torch.dtype, biases: Sequence[Tensor | None] | None = None,
    launch: Launch | int8_gemm.Launch | None = None, items: Items | None = None,
) -> list[Tensor]:  # fmt: skip
    """x times each weight, [tokens, rows] each, in one launch; the weights share group size and width, not bits.

    Args:
        biases: [rows] in ``dtype``, or None, for each weight.
        launch: for float16 or int8 as x is; by default as ``choose`` says.
        items: for weights of experts [E, rows, in_features]: which positions of x meet which expert.

    Raises:
        UnsupportedError: more than four weights, shapes or widths that the input does not serve, or no Hopper GPU.
    """
    _check(x, weights, items)
    device, units = x.values.device, x.values.shape[0]
    count = items.rows if items else x.count
    outs = [torch.empty(count, w.rows, dtype=dtype, device=device) for w in weights]
    if not count:
        return outs
    row_count = sum(w.rows for w in weights)
    use = launch or (choose if x.half else int8_gemm.choose)(x.count, row_count, units, gpu.multiprocessors(device))
    if use.half != x.half:
        raise UnsupportedError(f"{NAME}: {use} is not for inputs in {x.values.dtype}")
    if items is not None and use.paired:
        raise UnsupportedError(f"{NAME}: {use} fetches inputs in pairs, which experts have not: split must not be 2")
    parameters = _Gemm(
        x=x.values.data_ptr(), scales=x.scales.data_ptr(), items=address(items.work if items else None),
        rows_of=address(items.rows_of if items else None), tokens=x.count, blocks=x.values.shape[1],
        k=units * tiles.INPUTS, out_kind=KINDS[dtype],
    )  # fmt: skip
    blocks = 0
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        bias = address(biases[i] if biases else None)
        parameters.segments[i] = Segment(weight.parameters(x.half), out.data_ptr(), bias, weight.rows, blocks)
        blocks += -(-weight.rows // use.rows)
    parameters.row_blocks = -(-blocks // 2) * 2 if use.paired else blocks
    parameters.token_blocks = items.work.shape[0] if items else -(-x.count // use.tokens)
    every = parameters.row_blocks * parameters.token_blocks
    parameters.whole = whole_blocks(every, use.split, gpu.multiprocessors(device) * use.resident)
    formats, table = tuple(numbers(weights, MOST_OUTPUTS)), table_bytes(weights, x.half)
    run = _kernel(use, formats, x.group_size, items is not None, table, device.index)
    grid = parameters.whole + (every - parameters.whole) * use.split
    run((grid, 1, 1), 128 * use.warpgroups, parameters, early=True)
    return outs


def _check(x: Tokens, weights: Sequence[Weight], items: Items | None) -> None:
    reason = refusal(x.values.device)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    check(NAME, x.values.shape[0] * tiles.INPUTS, x.group_size, x.half, weights, items)


@cache
def _kernel(
    use: Launch | int8_gemm.Launch, formats: tuple[int, ...], group_size: int, items: bool, table: int, device: int
) -> nvrtc.Kernel:
    shared = use.shared_bytes(group_size) + table
    return nvrtc.kernel(use.file, use.instance(formats, group_size, items), device, shared)
