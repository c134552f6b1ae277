"""One new token of each sequence through a layer, by the native core: attention or GatedDeltaNet, then an MLP or experts.

Shapes: B sequences, x [B, 1, hidden], contiguous, in the model's dtype; what a function adds to it is computed in float32. Whoever describes a layer by the
structures here keeps the tensors alive that they point to.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, addressof, byref, c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cpu import threads
from kappaquant.kernels.cpu.library import DTYPES, Core, signs_of
from kappaquant.kernels.cpu.native import weight_of
from kappaquant.kernels.cpu.structures import (
    Attention,
    Cache,
    DeltaNet,
    Hidden,
    Layer,
    Mask,
    Matrix,
    Mlp,
    Moe,
    Norm,
    Rotary,
)

_Strides = c_int64 * 3
MASKS = {**DTYPES, torch.bool: 3}
"""Dtypes of masks, as step.h counts them."""


def packed_matrix(weight: Arranged, bias: Tensor | None) -> Matrix:
    """Of a weight [out, in] as on disk, in a format that ``Native`` takes."""
    assert isinstance(weight.fmt, GroupedFormat)
    rows, inputs = weight.shape
    place, kind = _bias(bias)
    signs = signs_of(weight.fmt.group_size).data_ptr()
    return Matrix(packed=weight_of(weight), bias=place, signs=signs, rows=rows, inputs=inputs, bias_dtype=kind)


def plain_matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Of a contiguous weight [out, in] in one of ``DTYPES``."""
    rows, inputs = weight.shape
    place, kind = _bias(bias)
    return Matrix(
        plain=weight.data_ptr(), bias=place, rows=rows, inputs=inputs, dtype=DTYPES[weight.dtype], bias_dtype=kind
    )


def norm(gain: Tensor, epsilon: float, plus_one: bool) -> Norm:
    """x / sqrt(mean(x^2) + epsilon) times the gain, or one more."""
    return Norm(gain.data_ptr(), epsilon, DTYPES[gain.dtype], plus_one)


def cache_of(keys: Tensor, values: Tensor) -> Cache:
    """Of keys and values [B, heads, slots, dim] in one of ``DTYPES``, with any strides but the last."""
    strides = [_Strides(*tensor.stride()[:3]) for tensor in (keys, values)]
    return Cache(keys.data_ptr(), values.data_ptr(), *strides, dtype=DTYPES[keys.dtype])


@dataclass(frozen=True)
class Stack:
    """Layers with their parts of a cache.

    Attributes:
        layers: structures, of which some point to ``caches``.
        caches: of those with attention.
    """

    layers: Array[Layer]
    caches: list[Cache]


def stack_of(
    mixers: Sequence[Attention | DeltaNet], mlps: Sequence[Mlp | Moe], held: Sequence[tuple[Tensor, ...]]
) -> Stack:
    """Of layers that have their parts of a static cache.

    Args:
        held: for attention its keys and values as ``cache_of`` takes them and the number of filled slots, int64 [1]; for GatedDeltaNet
            both states as ``Stepper.delta_net`` takes them.
    """
    caches, layers = [], []
    for mixer, mlp, (first, second, *filled) in zip(mixers, mlps, held, strict=True):
        layer = Layer(**{"moe" if isinstance(mlp, Moe) else "mlp": addressof(mlp)})
        if isinstance(mixer, Attention):
            caches.append(cache_of(first, second))
            layer.attention, layer.cache, layer.filled = addressof(mixer), addressof(caches[-1]), filled[0].data_ptr()
            layer.slots = first.shape[2]
        else:
            layer.delta_net, layer.conv_state, layer.state = addressof(mixer), first.data_ptr(), second.data_ptr()
            layer.length, layer.conv_dtype = first.shape[-1], DTYPES[first.dtype]
        layers.append(layer)
    return Stack((Layer * len(layers))(*layers), caches)


@dataclass(frozen=True)
class Stepper:
    """Steps in one way of multiplying.

    Attributes:
        exact: products are of float32 inputs.
        native: with its instruction set.
    """

    exact: bool
    native: Core

    def attention(
        self, x: Tensor, layer: Attention, rotary: tuple[Tensor, Tensor], cache: Cache, slot: int, mask: Tensor | None
    ) -> Tensor:
        """x + attention of its norm over the slots of a cache up to ``slot``, which the new token takes.

        Args:
            rotary: cosines and sines [B or 1, 1, rotated dimensions], in x's dtype.
            mask: [B or 1, 1, 1, more than ``slot``], added to scores, or true where a slot is seen.
        """
        out = torch.empty_like(x)
        _mask(cache, mask)
        self.native.library.kq_attention(
            *self._call(x, out), addressof(layer), byref(_rotary(rotary)), addressof(cache), slot
        )
        return out

    def queries(
        self, x: Tensor, layer: Attention, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor
    ) -> Tensor:
        """Queries, and gates where the layer has them, float32 [1 or 2, B, heads * dim], for ``attend``.

        Args:
            keys, values: [B, heads, 1, dim], where the new token's are put.
        """
        found = torch.empty(1 + layer.gated, x.shape[0], layer.heads * layer.dim)
        self.native.library.kq_queries(
            *self._call(x, x), addressof(layer), byref(_rotary(rotary)), byref(cache_of(keys, values)), found.data_ptr(),
            found[-1].data_ptr(),
        )  # fmt: skip
        return found

    def attend(
        self, x: Tensor, layer: Attention, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """x + what attention of such queries over keys and values [B, heads, slots, dim] gives; ``mask`` as for ``attention``.

        Raises:
            UnsupportedError: the mask has fewer slots than the keys.
        """
        out = torch.empty_like(x)
        keys, values = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (keys, values))
        if mask is not None and mask.shape[3] < keys.shape[2]:
            raise UnsupportedError(f"a mask of {mask.shape[3]} slots for {keys.shape[2]} keys")
        cache = cache_of(keys, values)
        _mask(cache, mask)
        self.native.library.kq_attend(
            *self._call(x, out),
            addressof(layer),
            queries.data_ptr(),
            queries[-1].data_ptr(),
            byref(cache),
            keys.shape[2],
        )
        return out

    def delta_net(self, x: Tensor, layer: DeltaNet, conv_state: Tensor, state: Tensor) -> Tensor:
        """x + GatedDeltaNet of its norm; both states move on in place.

        Args:
            conv_state: [B, channels, length].
            state: float32 [B, heads, key dim, value dim].
        """
        out = torch.empty_like(x)
        self.native.library.kq_deltanet(
            *self._call(x, out), addressof(layer), conv_state.data_ptr(), DTYPES[conv_state.dtype], conv_state.shape[-1],
            state.data_ptr(),
        )  # fmt: skip
        return out

    def layers(
        self, x: Tensor, stack: Stack, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> Tensor | None:
        """x through whole layers, whose caches move on by a token; None, and nothing has happened, where a cache or the mask is full.

        Args:
            rotary, mask: as for ``attention``.
        """
        out, seen = torch.empty_like(x), Mask()
        if mask is not None:
            stride = mask.stride(0) if mask.shape[0] > 1 else 0
            seen = Mask(mask.data_ptr(), stride, mask.shape[3], MASKS[mask.dtype])
        done = self.native.library.kq_layers(
            *self._call(x, out), addressof(stack.layers), len(stack.layers), byref(_rotary(rotary)) if rotary else None,
            byref(seen),
        )  # fmt: skip
        return out if done else None

    def apply(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [B, 1, hidden] times a matrix, [B, 1, rows] in x's dtype."""
        out = x.new_empty(*x.shape[:-1], matrix.rows)
        self.native.library.kq_apply(*self._call(x, out), addressof(matrix))
        return out

    def mlp_(self, x: Tensor, layer: Mlp | Moe) -> Tensor:
        """x + the MLP, or experts, of its norm, in place."""
        call = self.native.library.kq_moe if isinstance(layer, Moe) else self.native.library.kq_mlp
        call(*self._call(x, x), addressof(layer))
        return x

    def _call(self, x: Tensor, out: Tensor) -> tuple[Any, ...]:
        hidden = Hidden(x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[-1], DTYPES[x.dtype], self.exact)
        return self.native.level, threads.count(), byref(hidden)


def _rotary(rotary: tuple[Tensor, Tensor]) -> Rotary:
    cos, sin = rotary
    return Rotary(cos.data_ptr(), sin.data_ptr(), cos.shape[-1], cos.stride(0) if cos.shape[0] > 1 else 0)


def _mask(cache: Cache, mask: Tensor | None) -> None:
    if mask is None:
        cache.mask = None
        return
    cache.mask, cache.mask_dtype = mask.data_ptr(), MASKS[mask.dtype]
    cache.mask_stride = mask.stride(0) if mask.shape[0] > 1 else 0


def _bias(bias: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
