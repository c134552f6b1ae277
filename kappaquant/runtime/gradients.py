"""Gradients to inputs through products with packed weights, which have none themselves: for adapters that are trained beside them.

Forward runs the kernel that serves the weight; backward multiplies by the dequantized weight, some rows at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kappaquant.kernels import dispatch

if TYPE_CHECKING:
    from kappaquant.runtime.packed import PackedWeight

_TILE_BYTES = 1 << 26  # of decoded rows alive at once


def wanted(*inputs: Tensor) -> bool:
    """Whether the result of a product is to be traced back to these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class LinearProduct(torch.autograd.Function):
    """x [..., in] times a packed weight [out, in], and a bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight, prepared: list[Tensor], activations: str
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return dispatch.linear(x, prepared, weight.tensors, weight.spec, [weight.shape[0]], bias, activations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = grads[0].flatten(0, -2).float()
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _times_rows(flat, ctx.weight, None).view(*grads[0].shape[:-1], -1).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = flat.sum(0).to(grads[0].dtype)
        return to_x, to_bias, None, None, None


class GroupedProduct(torch.autograd.Function):
    """x [tokens, in] times weight[index] of a packed weight [E, out, in]: float32 [tokens, k, out]; 0 outside [0, E)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: PackedWeight) -> Tensor:
        ctx.save_for_backward(index)
        ctx.weight, ctx.x = weight, (x.shape, x.dtype)
        return dispatch.grouped_linear(x, index, weight.tensors, weight.spec, list(weight.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        shape, dtype = ctx.x
        to_x = torch.zeros(shape, dtype=torch.float32, device=grads[0].device)
        for expert, mine in _by_expert(index, ctx.weight.shape[0]):
            to_x.index_add_(0, mine[0], _times_rows(grads[0][mine].float(), ctx.weight, expert))
        return to_x.to(dtype), None, None


class ExpertsProduct(torch.autograd.Function):
    """Gated experts that one kernel runs, by ``dispatch.experts``; see there for shapes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weights: Tensor, gate_up: PackedWeight, down: PackedWeight, activations: str
    ) -> Tensor:
        ctx.save_for_backward(x, index, weights)
        ctx.gate_up, ctx.down = gate_up, down
        return dispatch.experts(
            x, index, weights, gate_up.tensors, down.tensors, dispatch.SEPARATOR.join((gate_up.spec, down.spec)),
            [*gate_up.shape, *down.shape], activations,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weights = ctx.saved_tensors
        to_x, to_weights = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(weights, dtype=torch.float32)
        for expert, mine in _by_expert(index, ctx.gate_up.shape[0]):
            rows = mine[0]
            with torch.enable_grad():  # what lies between the two weights is torch's to differentiate
                own, share = x[rows].float().requires_grad_(), weights[mine].float().requires_grad_()
                gate, up = (own @ _decoded(ctx.gate_up, expert).T).chunk(2, dim=-1)
                made = (torch.nn.functional.silu(gate) * up) @ _decoded(ctx.down, expert).T * share[:, None]
            of_x, of_weights = torch.autograd.grad(made, (own, share), grads[0][rows].float())
            to_x.index_add_(0, rows, of_x)
            to_weights[mine] = of_weights
        return to_x.to(x.dtype), None, to_weights.to(weights.dtype), None, None, None


def _by_expert(index: Tensor, experts: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each expert that occurs, with the (tokens, places among their k) that it was chosen in."""
    for expert in index.unique().tolist():
        if 0 <= expert < experts:
            yield expert, (index == expert).nonzero(as_tuple=True)


def _times_rows(grad: Tensor, weight: PackedWeight, expert: int | None) -> Tensor:
    """grad [tokens, out] times a matrix [out, in], float32 [tokens, in]; no more of it is decoded at once than a tile."""
    rows, inputs = weight.shape[-2:]
    step = max(1, _TILE_BYTES // (4 * inputs))
    out = grad.new_zeros(len(grad), inputs)
    for start in range(0, rows, step):
        out.addmm_(grad[:, start : start + step], _decoded(weight, expert, slice(start, start + step)))
    return out


def _decoded(weight: PackedWeight, expert: int | None, rows: slice = slice(None)) -> Tensor:
    """Rows of a matrix, float32, in whatever order a kernel holds it."""
    at = rows if expert is None else (expert, rows)
    parts = {suffix: part[at] for suffix, part in weight.stored().items()}
    return weight.fmt.decode(parts, weight.shape[-1]).to(torch.float32)
