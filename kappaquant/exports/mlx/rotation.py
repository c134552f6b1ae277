"""The rotation of the residual stream that an export folds into the weights on either side of it.

R = diag(s) · Q with fixed signs s and Q = T ⊗ H, both symmetric and orthogonal: H the Walsh-Hadamard transform of the largest power
of two that divides the width, T the discrete Hartley transform of the odd factor that is left. RMS norms without gain do not
notice R, so a model whose residual stream is x·R computes the same as before. No reader of an export needs to know R.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import torch
from torch import Tensor

_SEED = b"kappaquant residual rotation 1"
_BLOCK = 1 << 19  # elements at once, for the cache


def rotate(x: Tensor) -> Tensor:
    """x·R for vectors along the last axis, [..., width] -> float32 of the same shape."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(rows.shape)
    step = max(16, _BLOCK // width)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        out[block] = rotate_columns(rows[block].t()).t()
    return out.view(x.shape)


def rotate_columns(x: Tensor) -> Tensor:
    """Rᵀ·x for the columns of x, [width, M] -> float32 [width, M]. Elementwise operations only, hence the same on any core."""
    width, count = x.shape
    power = width & -width
    signs, odd = _signs(width), _hartley(width // power)
    source = torch.mul(x, signs, out=torch.empty(width, count))
    target = torch.empty_like(source)
    h = 1
    while h < power:
        a, b = (t.view(width // (2 * h), 2, h * count) for t in (source, target))
        torch.add(a[:, 0], a[:, 1], out=b[:, 0])
        torch.sub(a[:, 0], a[:, 1], out=b[:, 1])
        source, target, h = target, source, 2 * h
    if len(odd) > 1:
        a, b = (t.view(len(odd), power * count) for t in (source, target))
        for i, row in enumerate(odd):
            torch.mul(a[0], row[0], out=b[i])
            for j, factor in enumerate(row[1:], 1):
                b[i].add_(a[j] * factor)
        source = target
    return source.mul_(1 / math.sqrt(power))


@cache
def _signs(width: int) -> Tensor:
    """[width, 1] of +1 and -1, from a hash: no framework's random numbers."""
    drawn = hashlib.shake_256(_SEED).digest(-(-width // 8))
    bits = int.from_bytes(drawn, "little")
    return torch.tensor([[1.0 if bits >> i & 1 else -1.0] for i in range(width)])


@cache
def _hartley(size: int) -> tuple[tuple[float, ...], ...]:
    """cas(2πij / size) / sqrt(size), cas = cos + sin: symmetric and its own inverse."""
    turn = [2 * math.pi * k / size for k in range(size)]
    root = math.sqrt(size)
    cas = [(math.cos(t) + math.sin(t)) / root for t in turn]
    return tuple(tuple(cas[i * j % size] for j in range(size)) for i in range(size))
