"""One fused layer of a serving engine as one torch custom op: its input is rotated once for all parts of its matrix.

Shapes: a layer's matrix [n, in] is cut into parts, runs of rows stored alike: packed in one format, or kept. The op takes plain
tensors and numbers, so that torch.compile reuses one compiled layer for all that look the same, and a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.formats.codebook import Format
from kappaquant.kernels import dispatch as ops
from kappaquant.kernels import tiled as gpu_ops
from kappaquant.runtime.experts import KeptWeight
from kappaquant.runtime.packed import PackedWeight

_KEPT, _PACKED, _TILED = range(3)


def multiply(x: Tensor, parts: Iterable[PackedWeight | KeptWeight], bias: Tensor | None, activations: str) -> Tensor:
    """x [..., in] times the rows of all parts, one below the other: [..., n] in x's dtype."""
    tensors: list[Tensor] = []
    layout: list[int] = []
    centroids: list[float] = []
    for part in parts:
        if isinstance(part, KeptWeight):
            tensors.append(part.tensor)
            layout += [_KEPT, part.tensor.shape[0], 0, 0]
        elif part.tiled:
            tensors += [part.codes, part.tile_norms]
            centroids += part.centroids
            layout += [_TILED, part.shape[0], part.fmt.bits, part.fmt.group_size]
        else:
            tensors += [part.tq_packed, part.tq_norms, part.codebook]
            layout += [_PACKED, part.shape[0], part.fmt.bits, part.fmt.group_size]
    return _fused_linear(x, tensors, layout, centroids, bias, activations)


@torch.library.custom_op("kappaquant::fused_linear", mutates_args=())
def _fused_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    centroids: Sequence[float],
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    inputs = _Inputs(flat, activations)
    left, books = iter(tensors), iter(centroids)
    products = []
    for kind, rows, bits, group_size in zip(*[iter(layout)] * 4, strict=True):
        if kind == _KEPT:
            products.append(F.linear(flat, next(left)))
            continue
        fmt = Format(bits, group_size)
        if kind == _PACKED:
            held = next(left), next(left), next(left)
            products.append(ops.linear(inputs.rotated(group_size), *held, bits, group_size).to(x.dtype))
            continue
        codes, norms, book = next(left), next(left), [next(books) for _ in range(2**bits)]
        shape = (rows, x.shape[-1])
        if gpu_ops.decodes_first(flat.shape[0], x.device):
            products.append(gpu_ops.decoded_linear(flat, codes, norms, book, bits, group_size, *shape, None))
        else:
            products.append(
                gpu_ops.tiled_linear(inputs.quantized(fmt, rows), codes, norms, book, fmt, shape, None, x.dtype)
            )
    y = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], -1)


@_fused_linear.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    centroids: Sequence[float],
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(layout[1::4]))


class _Inputs:
    """What kernels make of an input [m, in], each kind made once for all parts."""

    def __init__(self, x: Tensor, activations: str) -> None:
        self._x = x
        self._activations = activations
        self._rotated: dict[int, Tensor] = {}
        self._quantized: dict[tuple[int, bool], gpu_ops.QuantizedInput] = {}

    def rotated(self, group_size: int) -> Tensor:
        if group_size not in self._rotated:
            self._rotated[group_size] = ops.rotate(self._x, group_size)
        return self._rotated[group_size]

    def quantized(self, fmt: Format, rows: int) -> gpu_ops.QuantizedInput:
        half = gpu_ops.needs_half(self._activations, fmt.bits, self._x.shape[0], rows)
        key = fmt.group_size, half
        if key not in self._quantized:
            self._quantized[key] = gpu_ops.quantize_input(self._x, *key)
        return self._quantized[key]
