"""Routed experts for few tokens on NVIDIA tensor cores, and a shared expert beside them: four launches, none waits for the host.

Slots are (token, expert) pairs, token first. The shared expert's rows follow those of all slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda import nvrtc, tiles
from kappaquant.kernels.cuda.arguments import KINDS, address
from kappaquant.kernels.cuda.inputs import Input, rotate
from kappaquant.kernels.cuda.tensor_cores import INT8_BITS, Codes, Inputs, Weight, numbers, table_bytes

NAME = "experts"
_WARPS = 8
_MOST_WARPS = 20  # of experts.cu


class _Part(ctypes.Structure):
    _fields_ = (("weight", Codes), ("rows", ctypes.c_int), ("first_block", ctypes.c_int), ("column", ctypes.c_int))


class _GateUp(ctypes.Structure):
    _fields_ = (
        ("parts", _Part * 3), ("inputs", Inputs), ("experts", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("tokens", ctypes.c_int), ("top_k", ctypes.c_int), ("width", ctypes.c_int), ("out_kind", ctypes.c_int),
        ("expert_count", ctypes.c_int),
    )  # fmt: skip


class _Down(ctypes.Structure):
    _fields_ = (
        ("routed", Codes), ("shared", Codes), ("inputs", Inputs), ("shared_inputs", Inputs),
        ("experts", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("gate", ctypes.c_void_p),
        ("residual", ctypes.c_void_p), ("out", ctypes.c_void_p), ("shared_first", ctypes.c_int),
        ("tokens", ctypes.c_int), ("top_k", ctypes.c_int), ("rows", ctypes.c_int), ("splits", ctypes.c_int),
        ("kind", ctypes.c_int), ("weight_kind", ctypes.c_int), ("expert_count", ctypes.c_int),
    )  # fmt: skip


nvrtc.declare("experts.cu", _Part, _GateUp, _Down, Inputs, Codes)


def refusal(weights: Sequence[Weight], half: bool) -> str | None:
    """Why these weights can not share launches, or None."""
    groups = {weight.fmt.group_size for weight in weights}
    if len(groups) > 1:
        return f"groups of {', '.join(map(str, sorted(groups)))} in one block of experts; all must be alike"
    wide = [weight.fmt.id for weight in weights if weight.fmt.bits not in INT8_BITS]
    if wide and not half:
        return f"int8 inputs serve {', '.join(map(str, INT8_BITS))} bits, not {wide[0]}"
    return None


def gate_up(
    x: Input, experts: Tensor, routed: Weight, shared: tuple[Weight, Weight] | None, dtype: torch.dtype
) -> Tensor:
    """x times each token's experts: [slots, 2 * intermediate], gate first; with a shared expert [slots + tokens, ...].

    Args:
        experts: int64 [tokens, top_k]; rows of those outside [0, E) are not defined.
        routed: [E, 2 * intermediate, hidden].
        shared: gate and up projections [intermediate, hidden] of the shared expert.
    """
    tokens, top_k = experts.shape
    slots, width = tokens * top_k, routed.rows
    rows = slots + tokens if shared else slots
    out = torch.empty(rows, width, dtype=dtype, device=x.values.device)
    if not tokens:
        return out
    parts = (routed, *(shared or ()))
    parameters = _GateUp(
        inputs=Inputs.of(x), experts=experts.data_ptr(), out=out.data_ptr(), tokens=tokens, top_k=top_k, width=width,
        out_kind=KINDS[dtype], expert_count=routed.tiled.codes.shape[0],
    )  # fmt: skip
    blocks = column = 0
    for i, part in enumerate(parts):
        parameters.parts[i] = _Part(part.parameters(x.half), part.rows, blocks, column)
        blocks += -(-part.rows // tiles.ROWS)
        column += part.rows if i else 0
    shared_bytes = 4 * 33 * _WARPS + table_bytes(parts, x.half)
    instance = f"gate_up<{', '.join(map(str, numbers(parts, 3)))}, {x.group_size}, {str(x.half).lower()}, {_WARPS}>"
    run = nvrtc.kernel("experts.cu", instance, out.device.index, shared_bytes)
    run((blocks, slots, 1), 32 * _WARPS, parameters, early=True)
    return out


def down(
    x: Input,
    experts: Tensor,
    weights: Tensor,
    routed: Weight,
    shared: Weight | None = None,
    shared_gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[tokens, hidden]: the experts' outputs, weighted and added in the order of the slots.

    Args:
        x: rotated [slots, intermediate], the shared expert's rows behind them.
        experts: int64 [tokens, top_k]; those outside [0, E) count nothing.
        weights: [tokens, top_k], in float32, float16 or bfloat16.
        routed: [E, hidden, intermediate].
        shared: [hidden, intermediate]; its output times sigmoid(shared_gate [tokens]) is added.
        residual: [tokens, hidden], added at the end.
        dtype: of the result, and of ``shared_gate`` and ``residual``; by default that of ``weights``.
    """
    tokens, top_k = experts.shape
    out = torch.empty(tokens, routed.rows, dtype=dtype or weights.dtype, device=weights.device)
    if not tokens:
        return out
    units = x.values.shape[1] // tiles.INPUTS
    jobs = top_k + (shared is not None)
    splits = max(1, min(units, _MOST_WARPS // jobs))
    warps = min(_MOST_WARPS, jobs * splits)
    codes = routed.parameters(x.half)
    inputs = Inputs.of(x)
    parameters = _Down(
        codes, shared.parameters(x.half) if shared else codes, inputs, inputs, experts.data_ptr(), weights.data_ptr(),
        address(shared_gate), address(residual), out.data_ptr(), tokens * top_k, tokens, top_k, routed.rows, splits,
        KINDS[out.dtype], KINDS[weights.dtype], routed.tiled.codes.shape[0],
    )  # fmt: skip
    parts = [routed, *([shared] if shared else [])]
    tables = sum(table_bytes([part], x.half) for part in parts)
    instance = f"down<{', '.join(map(str, numbers(parts, 2)))}, {x.group_size}, {str(x.half).lower()}>"
    run = nvrtc.kernel("experts.cu", instance, out.device.index, 2 * 4 * 33 * warps + tables)
    run((-(-routed.rows // tiles.ROWS), tokens, 1), 32 * warps, parameters, early=True)
    return out


def forward(
    x: Input, experts: Tensor, weights: Tensor, gate_up_proj: Weight, down_proj: Weight, dtype: torch.dtype
) -> Tensor:
    """down(silu(gate) * up) of each token's experts, weighted and added: x rotated [tokens, hidden] -> [tokens, hidden] in ``dtype``."""
    reason = refusal([gate_up_proj], x.half) or refusal([down_proj], x.half)  # each has a launch of its own
    if reason:
        raise UnsupportedError(f"{NAME}: {reason}")
    inner = gate_up(x, experts, gate_up_proj, None, dtype)
    gate, up = inner.chunk(2, dim=-1)
    rotated, _ = rotate(gate, down_proj.fmt, x.half, gate_of=up)
    return down(rotated, experts, weights, down_proj, dtype=dtype)
