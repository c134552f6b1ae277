"""Routed experts for many tokens on NVIDIA GPUs: slots sorted by expert on the device, two products, a weighted sum.

Slots are (token, choice) pairs, token first. Nothing waits for the host: shapes depend on the number of tokens alone, and
work that an unlucky routing would need is launched but empty.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import device as gpu
from kappaquant.kernels.cuda import gemm, int8_gemm, nvrtc, tensor_cores
from kappaquant.kernels.cuda.arguments import KINDS
from kappaquant.kernels.cuda.inputs import rotate, rotate_tokens
from kappaquant.kernels.cuda.launches import Items
from kappaquant.kernels.cuda.tensor_cores import Weight

NAME = "sorted_experts"
_MOST_EXPERTS = 2048  # their counts lie in shared memory
_SLOTS_OF_ONE_BLOCK = 1024  # beyond, a cluster counts and orders them sooner


class _Sort(ctypes.Structure):
    _fields_ = (
        ("experts", ctypes.c_void_p), ("positions", ctypes.c_void_p), ("rows_of", ctypes.c_void_p),
        ("work", ctypes.c_void_p), ("slots", ctypes.c_int), ("expert_count", ctypes.c_int), ("items", ctypes.c_int),
        ("each", ctypes.c_int),
    )  # fmt: skip


class _Combine(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("positions", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("top_k", ctypes.c_int), ("width", ctypes.c_int),
    )  # fmt: skip


nvrtc.declare("sort_experts.cu", _Sort, _Combine)


Launch = gemm.Launch | int8_gemm.Launch | tensor_cores.Launch


@dataclass(frozen=True)
class Sorted:
    """Slots in the order of their experts.

    Attributes:
        positions: int32 [tokens, top_k] where each slot goes, -1 where its expert is none; an expert begins at a multiple of 8.
        blocks: blocks of 8 positions that any routing fits in.
        items: the work of thread blocks.
    """

    positions: Tensor
    blocks: int
    items: Items


def sort(experts: Tensor, expert_count: int, each: int) -> Sorted:
    """Slots of int64 experts [tokens, top_k], those in [0, expert_count); an item has up to ``each`` of them."""
    slots, occupied = experts.numel(), min(expert_count, experts.numel())
    blocks = (slots + 7 * occupied) // 8
    positions = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    rows_of = torch.empty(8 * blocks, dtype=torch.int32, device=experts.device)
    work = torch.empty(occupied + slots // each, 4, dtype=torch.int32, device=experts.device)
    blocks_of_sort = 1 if slots <= _SLOTS_OF_ONE_BLOCK or gemm.refusal(experts.device) else 8
    run = nvrtc.kernel("sort_experts.cu", f"sort_experts<{blocks_of_sort}>", experts.device.index, 12 * expert_count)
    run(
        (blocks_of_sort, 1, 1), 1024,
        _Sort(
            experts.data_ptr(), positions.data_ptr(), rows_of.data_ptr(), work.data_ptr(), slots, expert_count,
            work.shape[0], each,
        ),
    )  # fmt: skip
    return Sorted(positions, blocks, Items(work, rows_of, slots))


def combine(y: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """Sum of weight * y over those of a token's choices that have a position: y [tokens * top_k, width] -> [tokens, width].

    Args:
        weights: [tokens, top_k].
        positions: int32 [tokens, top_k], see ``Sorted``.
    """
    tokens, top_k = weights.shape
    out = y.new_empty(tokens, y.shape[1])
    each = math.gcd(y.shape[1], 16 // y.element_size())
    instance = f"combine<{KINDS[y.dtype]}, {KINDS[weights.dtype]}, {each}>"
    run = nvrtc.kernel("sort_experts.cu", instance, y.device.index)
    run(
        (tokens, 1, 1),
        256,
        _Combine(y.data_ptr(), weights.data_ptr(), positions.data_ptr(), out.data_ptr(), top_k, y.shape[1]),
    )
    return out


def expected_experts(tokens: int, top_k: int, expert_count: int) -> float:
    """How many experts tokens meet at even routing, each as many others as it chooses."""
    return expert_count * (1 - (1 - min(1.0, top_k / expert_count)) ** tokens)


def choose(tokens: int, top_k: int, weight: Weight, half: bool, wide: bool) -> Launch:
    """An item for most experts at even routing, so that most weights are decoded once; as measured on an H200.

    Few tokens of an expert are multiplied as those of a linear layer are. float16 inputs in blocks of 8 tokens, which would do up to 4 an expert,
    take 5 % longer than in blocks of 16.

    Args:
        weight: of experts.
        half: whether inputs are float16; how many tokens an item has depends on nothing else of a weight than its experts.
        wide: whether the card makes products of more than 16 tokens (``gemm``).
    """
    expert_count, tile_count, units = weight.tiled.codes.shape[:3]
    mean = tokens * top_k / expert_count
    usual = mean + math.sqrt(mean)
    if not wide or usual <= (8 if half else 16):
        number = tensor_cores.numbers([weight], 1)[0]
        items = expected_experts(tokens, top_k, expert_count)
        return tensor_cores.choose_for_experts(8 if usual <= 8 else 16, items, tile_count, units, number, half)
    if not half and usual <= 64:
        return int8_gemm.Launch(32, 1, 1, 4, 3) if usual <= 32 else int8_gemm.Launch(64, 1, 1, 4, 2)
    block = next((n for n in (16, 32, 64) if usual <= n), 128)
    return gemm.Launch(block, 1, 1, 4 if block <= 32 else 3, {16: 4, 32: 3}.get(block, 2))


def refusal(x: Tensor, gate_up: Weight) -> str | None:
    """Why these experts can not be run here, or None."""
    if gate_up.tiled.codes.shape[0] > _MOST_EXPERTS:
        return f"{gate_up.tiled.codes.shape[0]} experts; at most {_MOST_EXPERTS}"
    return gpu.refusal(x.device)


def linear(x: Tensor, index: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """x [tokens, in] times the matrices of each token's experts, [tokens * k, rows], for a weight [E, rows, in]; float16 inputs.

    Args:
        index: int64 [tokens, k]; rows of those outside [0, E) are not defined.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    reason = refusal(x, weight)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    tokens, top_k = index.shape
    use = choose(tokens, top_k, weight, True, gemm.refusal(x.device) is None)
    plan = sort(index, weight.tiled.codes.shape[0], use.tokens)
    return _product(x, None, plan.positions, weight, dtype, True, use, plan)


def forward(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Weight, down: Weight, half: bool,
    launches: tuple[Launch, Launch] | None = None,
) -> Tensor:  # fmt: skip
    """down(silu(gate) * up) of each token's experts, weighted and added: x [tokens, hidden] -> [tokens, hidden].

    Args:
        top_k_index: int64 [tokens, top_k]; what lies outside [0, E) counts nothing.
        top_k_weights: [tokens, top_k], in float32, float16 or bfloat16.
        gate_up: [E, 2 * intermediate, hidden], gate first.
        down: [E, hidden, intermediate].
        half: whether inputs must be float16; else they are int8 where that is faster.
        launches: of both products, for as many tokens each; by default as ``choose`` says.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    reason = refusal(x, gate_up)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    if not x.shape[0]:
        return torch.empty_like(x)
    (tokens, top_k), wide = top_k_index.shape, gemm.refusal(x.device) is None
    first, second = launches or (choose(tokens, top_k, weight, half, wide) for weight in (gate_up, down))
    plan = sort(top_k_index.contiguous(), gate_up.tiled.codes.shape[0], first.tokens)
    inner = _product(x, None, plan.positions, gate_up, x.dtype, half, first, plan)
    gate, up = inner.chunk(2, dim=-1)
    y = _product(gate, up, plan.positions.view(-1, 1), down, x.dtype, half, second, plan)
    return combine(y, top_k_weights.contiguous(), plan.positions)


def _product(
    x: Tensor, gate_of: Tensor | None, positions: Tensor, weight: Weight, dtype: torch.dtype, half: bool, use: Launch, plan: Sorted
) -> Tensor:  # fmt: skip
    """[slots, rows]: x, or silu(x) * gate_of, of each slot times its expert's matrix.

    Args:
        positions: int32 [rows of x, copies] where each copy of a row goes.
    """
    if isinstance(use, tensor_cores.Launch):
        rotated, _ = rotate(x, weight.fmt, half, gate_of=gate_of, positions=positions, places=8 * plan.blocks)
        return tensor_cores.linear(rotated, [weight], dtype, launch=use, items=plan.items)[0]
    tokens, _ = rotate_tokens(x, weight.fmt, use.half, gate_of=gate_of, positions=positions, blocks=plan.blocks)
    return gemm.linear(tokens, [weight], dtype, launch=use, items=plan.items)[0]
