"""One new token of each sequence through a layer, by the native core: attention or GatedDeltaNet, then an MLP or experts.

Shapes: B sequences, x [B, hidden] in the model's dtype; what a function adds to it is computed in float32. Whoever describes a layer by the
structures here keeps the tensors alive that they point to.
"""

from __future__ import annotations

from ctypes import addressof, c_int64

import torch
from torch import Tensor

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cpu.library import DTYPES, Core, signs_of
from kappaquant.kernels.cpu.native import weight_of
from kappaquant.kernels.cpu.structures import Attention, Cache, DeltaNet, Hidden, Matrix, Mlp, Moe, Norm

_Strides = c_int64 * 3
MASKS = {**DTYPES, torch.bool: 3}
"""Dtypes of masks, as step.h counts them."""


def packed_matrix(weight: Arranged, bias: Tensor | None) -> Matrix:
    """Of a weight [out, in] as on disk, in a codebook format."""
    assert isinstance(weight.fmt, CodebookFormat)
    rows, inputs = weight.shape
    place, kind = _bias(bias)
    signs = signs_of(weight.fmt.group_size).data_ptr()
    return Matrix(packed=weight_of(weight), bias=place, signs=signs, rows=rows, inputs=inputs, bias_dtype=kind)


def plain_matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Of a contiguous weight [out, in] in one of ``DTYPES``."""
    rows, inputs = weight.shape
    place, kind = _bias(bias)
    return Matrix(plain=weight.data_ptr(), bias=place, rows=rows, inputs=inputs, dtype=DTYPES[weight.dtype], bias_dtype=kind)


def norm(gain: Tensor, epsilon: float, plus_one: bool) -> Norm:
    """x / sqrt(mean(x^2) + epsilon) times the gain, or one more."""
    return Norm(gain.data_ptr(), epsilon, DTYPES[gain.dtype], plus_one)


def queries(
    x: Tensor, layer: Attention, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, exact: bool, native: Core
) -> Tensor:
    """Queries, and gates where the layer has them, float32 [1 or 2, B, heads * dim], for ``attend``.

    Args:
        rotary: cosines and sines [B or 1, 1, rotated dimensions], in x's dtype.
        keys, values: [B, heads, 1, dim], any strides between heads; the new token's are put there.
        exact: multiply by float32 inputs.
    """
    found = torch.empty(1 + layer.gated, x.shape[0], layer.heads * layer.dim)
    hidden, cache = _hidden(x, x, exact), _cache(keys, values)
    cos, sin = rotary
    native.library.kq_queries(
        native.level, torch.get_num_threads(), addressof(hidden), addressof(layer), cos.data_ptr(), sin.data_ptr(),
        cos.shape[-1], cos.stride(0) if cos.shape[0] > 1 else 0, found.data_ptr(), found[-1].data_ptr(), addressof(cache),
    )  # fmt: skip
    return found


def attend(
    x: Tensor, layer: Attention, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, exact: bool, native: Core
) -> Tensor:
    """x + what attention over keys and values [B, heads, slots, dim] gives.

    Args:
        mask: [B or 1, 1, 1, at least as many slots], added to scores, or true where a slot is seen.
    """
    out = torch.empty_like(x)
    hidden, cache = _hidden(x, out, exact), _cache(keys, values)
    if mask is not None:
        cache.mask, cache.mask_dtype = mask.data_ptr(), MASKS[mask.dtype]
        cache.mask_stride = mask.stride(0) if mask.shape[0] > 1 else 0
    native.library.kq_attend(
        native.level, torch.get_num_threads(), addressof(hidden), addressof(layer), queries.data_ptr(), queries[-1].data_ptr(),
        addressof(cache),
    )  # fmt: skip
    return out


def delta_net(x: Tensor, layer: DeltaNet, conv_state: Tensor, state: Tensor, exact: bool, native: Core) -> Tensor:
    """x + GatedDeltaNet of its norm; conv_state [B, channels, length] and state, float32 [B, heads, dk, dv], move on in place."""
    out = torch.empty_like(x)
    hidden = _hidden(x, out, exact)
    native.library.kq_deltanet(
        native.level, torch.get_num_threads(), addressof(hidden), addressof(layer), conv_state.data_ptr(),
        DTYPES[conv_state.dtype], conv_state.shape[-1], state.data_ptr(),
    )  # fmt: skip
    return out


def mlp(x: Tensor, layer: Mlp | Moe, exact: bool, native: Core) -> Tensor:
    """x + the MLP, or experts, of its norm."""
    out = torch.empty_like(x)
    hidden = _hidden(x, out, exact)
    call = native.library.kq_moe if isinstance(layer, Moe) else native.library.kq_mlp
    call(native.level, torch.get_num_threads(), addressof(hidden), addressof(layer))
    return out


def _hidden(x: Tensor, out: Tensor, exact: bool) -> Hidden:
    return Hidden(x.data_ptr(), out.data_ptr(), *x.shape, DTYPES[x.dtype], exact)


def _cache(keys: Tensor, values: Tensor) -> Cache:
    strides = [_Strides(*tensor.stride()[:3]) for tensor in (keys, values)]
    return Cache(keys.data_ptr(), values.data_ptr(), *strides, keys.shape[2], dtype=DTYPES[keys.dtype])


def _bias(bias: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
