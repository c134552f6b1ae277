"""Routed experts for many tokens on NVIDIA Hopper GPUs: slots sorted by expert on the device, two products, a weighted sum.

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
from kappaquant.kernels.cuda import gemm, nvrtc
from kappaquant.kernels.cuda.arguments import KINDS
from kappaquant.kernels.cuda.inputs import rotate_tokens
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
    items: gemm.Items


def sort(experts: Tensor, expert_count: int, each: int) -> Sorted:
    """Slots of int64 experts [tokens, top_k], those in [0, expert_count); an item has up to ``each`` of them."""
    slots, occupied = experts.numel(), min(expert_count, experts.numel())
    blocks = (slots + 7 * occupied) // 8
    positions = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    rows_of = torch.empty(8 * blocks, dtype=torch.int32, device=experts.device)
    work = torch.empty(occupied + slots // each, 4, dtype=torch.int32, device=experts.device)
    blocks_of_sort = 1 if slots <= _SLOTS_OF_ONE_BLOCK else 8
    run = nvrtc.kernel("sort_experts.cu", f"sort_experts<{blocks_of_sort}>", experts.device.index, 12 * expert_count)
    run(
        (blocks_of_sort, 1, 1), 1024,
        _Sort(
            experts.data_ptr(), positions.data_ptr(), rows_of.data_ptr(), work.data_ptr(), slots, expert_count,
            work.shape[0], each,
        ),
    )  # fmt: skip
    return Sorted(positions, blocks, gemm.Items(work, rows_of, slots))


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


def choose(slots: int, expert_count: int) -> gemm.Launch:
    """An item for most experts at even routing, so that most weights are decoded once; as measured on an H200.

    Blocks of 8 tokens, which would do up to 4 an expert, take 5 % longer than blocks of 16.
    """
    mean = slots / expert_count
    tokens = next((n for n in (16, 32, 64) if mean + math.sqrt(mean) <= n), 128)
    return gemm.Launch(tokens, 1, 1, 4 if tokens <= 32 else 3, {16: 4, 32: 3}.get(tokens, 2))


def refusal(x: Tensor, gate_up: Weight) -> str | None:
    """Why these experts can not be run here, or None."""
    if gate_up.tiled.codes.shape[0] > _MOST_EXPERTS:
        return f"{gate_up.tiled.codes.shape[0]} experts; at most {_MOST_EXPERTS}"
    return gemm.refusal(x.device)


def linear(x: Tensor, index: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """x [tokens, in] times the matrices of each token's experts, [tokens * k, rows], for a weight [E, rows, in].

    Args:
        index: int64 [tokens, k]; rows of those outside [0, E) are not defined.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    reason = refusal(x, weight)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    expert_count = weight.tiled.codes.shape[0]
    use = choose(index.numel(), expert_count)
    plan = sort(index, expert_count, use.tokens)
    rotated, _ = rotate_tokens(x, weight.fmt, True, positions=plan.positions, blocks=plan.blocks)
    (y,) = gemm.linear(rotated, [weight], dtype, launch=use, items=plan.items)
    return y


def forward(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Weight, down: Weight,
    launches: tuple[gemm.Launch, gemm.Launch] | None = None,
) -> Tensor:  # fmt: skip
    """down(silu(gate) * up) of each token's experts, weighted and added: x [tokens, hidden] -> [tokens, hidden].

    Args:
        top_k_index: int64 [tokens, top_k]; what lies outside [0, E) counts nothing.
        top_k_weights: [tokens, top_k], in float32, float16 or bfloat16.
        gate_up: [E, 2 * intermediate, hidden], gate first.
        down: [E, hidden, intermediate].
        launches: of both products, for as many tokens each; by default as ``choose`` says.

    Raises:
        UnsupportedError: see ``refusal``.
    """
    reason = refusal(x, gate_up)
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    if not x.shape[0]:
        return torch.empty_like(x)
    expert_count = gate_up.tiled.codes.shape[0]
    first, second = launches or (choose(top_k_index.numel(), expert_count),) * 2
    plan = sort(top_k_index.contiguous(), expert_count, first.tokens)
    rotated, _ = rotate_tokens(x, gate_up.fmt, True, positions=plan.positions, blocks=plan.blocks)
    (inner,) = gemm.linear(rotated, [gate_up], x.dtype, launch=first, items=plan.items)
    gate, up = inner.chunk(2, dim=-1)
    rotated, _ = rotate_tokens(
        gate, down.fmt, True, gate_of=up, positions=plan.positions.view(-1, 1), blocks=plan.blocks
    )
    (y,) = gemm.linear(rotated, [down], x.dtype, launch=second, items=plan.items)
    return combine(y, top_k_weights.contiguous(), plan.positions)
