"""The dispatch for NVIDIA GPUs: torch custom ops on tiled weights, each choosing its kernel by batch size and format.

Shapes: ``codes`` int32 and ``norms`` float16 as ``kernels.tiles`` orders them, for a weight [n, in] or experts [E, n, in];
an input [..., in] is quantized once for all weights that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import Format
from kappaquant.kernels.cuda import decoded, gemm, inputs, sorted_experts, tensor_cores, tiles
from kappaquant.kernels.cuda import experts as few_experts

ACTIVATIONS = ("int8", "bf16")  # the default first: see docs/kernels.md for what each loses
FEW_TOKENS = 16  # up to which weights are decoded anew for every 8; beyond, Hopper's wider products are faster
# up to which wider products take int8, where rows are many, and few; beyond, scaling the sums costs more than is gained
INT8_TOKENS = (64, 128)
INT8_ROWS = 16384  # that count as few
# from which reading a decoded weight back costs less than decoding it for every 256; elsewhere 128
DECODED_TOKENS = 2048
_FEW_SLOTS = 256  # (token, expert) pairs up to which an expert is read again for each of its tokens


_LIBRARY = torch.library.Library("kappaquant", "FRAGMENT")


def _op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a custom op without what ``torch.library.custom_op`` adds for gradients, which costs as much as
    a launch; ``fake`` is its form without data."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kappaquant::{name}", fake, lib=_LIBRARY)
        op: Callable[..., Any] = getattr(torch.ops.kappaquant, name).default
        return op

    return register


class QuantizedInput(NamedTuple):
    """An input of m tokens as its kernel multiplies it: ``Input`` or ``Tokens`` of ``kernels.inputs``, taken apart."""

    values: Tensor
    scales: Tensor
    halves: Tensor
    tokens: int


def check_activations(activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise UnsupportedError(f"activations {activations!r}: must be one of {', '.join(ACTIVATIONS)}")


def needs_half(activations: str, bits: int, tokens: int = 1, rows: int = 1) -> bool:
    """Whether ``tokens`` of float16 inputs, not int8, multiply a weight of this width with so many rows."""
    return activations != "int8" or bits not in tensor_cores.INT8_BITS or tokens > INT8_TOKENS[rows <= INT8_ROWS]


def refusal(norms: Tensor, centroids: Sequence[float]) -> str | None:
    """Why a weight stays in the order of the disk and runs in torch, or None."""
    reason = tensor_cores.refusal(norms.device, centroids) or norms_refusal(norms)
    return reason and f"{tensor_cores.NAME}: {reason}"


def norms_refusal(norms: Tensor) -> str | None:
    """Why norms can not be held in float16, or None: none may become infinite, zero, or lose digits as a subnormal."""
    if norms.dtype == torch.float16 or not norms.numel():
        return None
    size = norms.abs()
    most, least = torch.finfo(torch.float16).max, torch.finfo(torch.float16).tiny
    if bool((size > most).any()):
        return f"a norm is {size.max().item():.6g}, float16 holds at most {most:g}"
    if bool(((size > 0) & (size < least)).any()):
        return f"a norm is {size[size > 0].min().item():.6g}, float16 loses digits below {least:.6g}"
    return None


def tile(packed: Tensor, norms: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(codes, norms) of packed uint8 [..., n, bytes] and norms [..., n, G]."""
    tiled = tiles.tile(packed, norms.half(), fmt)
    return tiled.codes, tiled.norms


def untile(codes: Tensor, norms: Tensor, fmt: Format, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inverse of ``tile`` for a weight of this shape."""
    return tiles.untile(tiles.Tiled(codes, norms), fmt, shape[-2], fmt.groups(shape[-1]))


def _quantize_input_fake(x: Tensor, group_size: int, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, k = x.numel() // x.shape[-1], tiles.padded(x.shape[-1], Format(2, group_size))
    if _many(tokens, x.device):
        made = inputs.Tokens.empty(k, -(-tokens // 8), group_size, tokens, half, x.device)
        return made.values, made.scales, made.scales.new_empty(0)
    values = x.new_empty(tokens, k, dtype=torch.float16 if half else torch.int8)
    scales = x.new_empty(k // group_size, inputs.padded_tokens(tokens), dtype=torch.float32)
    return values, scales, scales.new_empty(0) if half else torch.empty_like(scales)


@_op(_quantize_input_fake)
def _quantize_input(x: Tensor, group_size: int, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    flat = (flat if flat.dtype in inputs.KINDS else flat.float()).contiguous()
    fmt = _format(2, group_size)  # any width: only groups matter to an input
    if _many(flat.shape[0], x.device):
        ordered, _ = inputs.rotate_tokens(flat, fmt, half)
        return ordered.values, ordered.scales, ordered.scales.new_empty(0)
    made, _ = inputs.rotate(flat, fmt, half)
    return made.values, made.scales, made.scales.new_empty(0) if half else made.halves


def _many(tokens: int, device: torch.device) -> bool:
    """Whether products of so many tokens are those of ``kernels.gemm``."""
    return tokens > FEW_TOKENS and gemm.refusal(device) is None


def quantize_input(x: Tensor, group_size: int, half: bool) -> QuantizedInput:
    """x [..., in], rotated: float16 if ``half``, else int8."""
    values, scales, halves = _quantize_input(x, group_size, half)
    return QuantizedInput(values, scales, halves, x.numel() // x.shape[-1])


def _tiled_linear_fake(
    values: Tensor,
    scales: Tensor,
    halves: Tensor,
    tokens: int,
    codes: Tensor,
    norms: Tensor,
    centroids: Sequence[float],
    bits: int,
    group_size: int,
    n: int,
    in_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty(tokens, n, dtype=dtype)


@_op(_tiled_linear_fake)
def _tiled_linear(
    values: Tensor,
    scales: Tensor,
    halves: Tensor,
    tokens: int,
    codes: Tensor,
    norms: Tensor,
    centroids: Sequence[float],
    bits: int,
    group_size: int,
    n: int,
    in_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weight = _weight(codes, norms, centroids, bits, group_size, n, in_features)
    kernel_dtype = dtype if dtype in inputs.KINDS else torch.float32
    biases = None if bias is None else [bias.to(kernel_dtype)]
    if values.dim() == 5:
        (y,) = gemm.linear(inputs.Tokens(values, scales, group_size, tokens), [weight], kernel_dtype, biases)
    else:
        x = inputs.Input(values, scales, halves if halves.numel() else scales, group_size)
        (y,) = tensor_cores.linear(x, [weight], kernel_dtype, biases)
    return y.to(dtype)


def tiled_linear(
    x: QuantizedInput,
    codes: Tensor,
    norms: Tensor,
    centroids: Sequence[float],
    fmt: Format,
    shape: Sequence[int],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A quantized input of m tokens times a weight of ``shape`` [n, in]: [m, n] in ``dtype``."""
    return _tiled_linear(*x, codes, norms, centroids, fmt.bits, fmt.group_size, *shape, bias, dtype)


def decodes_first(tokens: int, device: torch.device) -> bool:
    """Whether so many tokens are multiplied by a decoded weight, and need not be quantized."""
    return tokens >= (DECODED_TOKENS if gemm.refusal(device) is None else 128)


def _decoded_linear_fake(
    x: Tensor,
    codes: Tensor,
    norms: Tensor,
    centroids: Sequence[float],
    bits: int,
    group_size: int,
    n: int,
    in_features: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], n)


@_op(_decoded_linear_fake)
def decoded_linear(
    x: Tensor,
    codes: Tensor,
    norms: Tensor,
    centroids: Sequence[float],
    bits: int,
    group_size: int,
    n: int,
    in_features: int,
    bias: Tensor | None,
) -> Tensor:
    """x [m, in] times a weight [n, in] that is decoded piece by piece: [m, n] in x's dtype."""
    weight = _weight(codes, norms, centroids, bits, group_size, n, in_features)
    return decoded.linear(x, weight, bias)


def _tiled_experts_fake(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    codes: Sequence[Tensor],
    norms: Sequence[Tensor],
    centroids: Sequence[float],
    bits: Sequence[int],
    group_size: int,
    inner: int,
    half: bool,
) -> Tensor:
    return torch.empty_like(x)


@_op(_tiled_experts_fake)
def tiled_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    codes: Sequence[Tensor],
    norms: Sequence[Tensor],
    centroids: Sequence[float],
    bits: Sequence[int],
    group_size: int,
    inner: int,
    half: bool,
) -> Tensor:
    """Gated experts: x, [m, hidden], each token through its top_k experts, weighted and added -> [m, hidden].

    Args:
        top_k_index: int64 [m, top_k].
        codes, norms, bits: of gate_up_proj [E, 2 * inner, hidden] and down_proj [E, hidden, inner].
        centroids: both codebooks, one after the other.
    """
    dtype = x.dtype if x.dtype in inputs.KINDS else torch.float32
    hidden, first = x.shape[1], 2 ** bits[0]
    gate_up = _weight(codes[0], norms[0], centroids[:first], bits[0], group_size, 2 * inner, hidden)
    down = _weight(codes[1], norms[1], centroids[first:], bits[1], group_size, hidden, inner)
    x, weights, index = x.to(dtype).contiguous(), top_k_weights.to(dtype).contiguous(), top_k_index.contiguous()
    if index.numel() > _FEW_SLOTS and sorted_experts.refusal(x, gate_up, down) is None:
        return sorted_experts.forward(x, index, weights, gate_up, down)
    outs, step = [], max(1, _FEW_SLOTS // index.shape[1])
    for at in range(0, len(x), step):
        rotated, _ = inputs.rotate(x[at : at + step], gate_up.fmt, half)
        outs.append(few_experts.forward(rotated, index[at : at + step], weights[at : at + step], gate_up, down))
    return torch.cat(outs) if outs else torch.empty_like(x)


def _weight(
    codes: Tensor, norms: Tensor, centroids: Sequence[float], bits: int, group_size: int, n: int, in_features: int
) -> tensor_cores.Weight:
    return tensor_cores.Weight(tiles.Tiled(codes, norms), _format(bits, group_size), n, in_features, tuple(centroids))


@cache
def _format(bits: int, group_size: int) -> Format:
    return Format(bits, group_size)
