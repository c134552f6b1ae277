"""The codec's decoding side in plain MLX operations, for any MLX device. ``kappaquant.formats.codec`` is the truth.

Shapes: packed uint8 [..., G * bytes_per_group], norms [..., G], codebook float32, the values of ``fmt.codebook``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

import mlx.core as mx

from kappaquant.formats.base import Format
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.signs import signs
from kappaquant.formats.trellis import TRELLIS, TrellisFormat


def rotate(x: mx.array, group_size: int) -> mx.array:
    """s2 * H(s1 * x) for each group of the last axis: [..., in] -> float32 [..., G * group_size], zero-padded."""
    s1, s2 = (mx.array(s, dtype=mx.float32) for s in signs(group_size))
    y = _groups(x.astype(mx.float32), group_size)
    return (_hadamard(y * s1) * s2).flatten(-2)


def unrotate(y: mx.array, group_size: int) -> mx.array:
    """Inverse of ``rotate``: s1 * H(s2 * y), float32 [..., G * group_size]."""
    s1, s2 = (mx.array(s, dtype=mx.float32) for s in signs(group_size))
    return (_hadamard(_groups(y, group_size) * s2) * s1).flatten(-2)


def decodes(fmt: Format | None) -> TypeGuard[GroupedFormat]:
    """Whether ``indices`` takes a format."""
    return type(fmt) in _INDICES


def indices(packed: mx.array, fmt: GroupedFormat) -> mx.array:
    """Which values of the codebook a row's weights have: uint8 [..., G * group_size]."""
    return _INDICES[type(fmt)](packed, fmt)


def unpack(packed: mx.array, bits: int) -> mx.array:
    """Codes uint8 [..., G * group_size]: code i of a row fills bits [i*bits, (i+1)*bits) of its little-endian stream."""
    octets = packed.reshape(*packed.shape[:-1], -1, bits)  # eight codes fill ``bits`` bytes
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = octets[..., byte] >> shift
        if shift + bits > 8:
            code = code | (octets[..., byte + 1] << (8 - shift))
        codes.append(code & (2**bits - 1))
    return mx.stack(codes, axis=-1).flatten(-2)  # a gather over the bytes took 35 ns a code on a CPU, this 1


def levels(packed: mx.array, group_size: int, bits: int) -> mx.array:
    """Level indices uint8 [..., G * group_size] of trellis codes: 32 weights' subsets are xors of words of their group's ring."""
    planes = packed.reshape(*packed.shape[:-1], -1, bits, group_size // 8)
    path = planes[..., 0, :].view(mx.uint32)
    subset = [_parity(path, backs).view(mx.uint8) for backs in (TRELLIS.lower, TRELLIS.upper)]
    octets = [*subset, *(planes[..., k, :] for k in range(1, bits))]  # bit k of eight weights' levels
    found = []
    for i in range(8):
        level = octets[0] >> i & 1
        for k, octet in enumerate(octets[1:], 1):
            level = level | (octet >> i & 1) << k
        found.append(level)
    return mx.stack(found, axis=-1).flatten(-3)


def decode_rotated(packed: mx.array, norms: mx.array, codebook: mx.array, fmt: GroupedFormat) -> mx.array:
    """norm * c[index], the weight's rotation: float32 [..., G * group_size]. Its product with ``rotate(x)`` is x . w."""
    return _scaled(codebook[indices(packed, fmt)], norms, fmt.group_size)


def decode(packed: mx.array, norms: mx.array, codebook: mx.array, fmt: GroupedFormat, in_features: int) -> mx.array:
    """The weight itself, float32 [..., in_features]."""
    # norms last, as the codec does, so that the bits are its own
    return _scaled(unrotate(codebook[indices(packed, fmt)], fmt.group_size), norms, fmt.group_size)[..., :in_features]


def _scaled(values: mx.array, norms: mx.array, group_size: int) -> mx.array:
    return (_groups(values, group_size) * norms[..., None].astype(mx.float32)).flatten(-2)


def _hadamard(x: mx.array) -> mx.array:
    # a division at the end, as docs/format.md has it: to multiply by 1 / sqrt(32) or 1 / sqrt(128) rounds otherwise
    return mx.hadamard_transform(x, scale=1.0) / math.sqrt(x.shape[-1])


def _parity(path: mx.array, backs: Sequence[int]) -> mx.array:
    """Xor of the path bits so many weights back, path uint32 [..., words] being a ring, the first weight's bit lowest."""
    before = mx.roll(path, 1, -1)
    found = mx.zeros_like(path)
    for back in backs:
        found = found ^ (path << back | before >> (32 - back) if back else path)
    return found


def _groups(x: mx.array, group_size: int) -> mx.array:
    missing = -x.shape[-1] % group_size
    if missing:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, group_size)


_INDICES: dict[type[Format], Callable[[mx.array, GroupedFormat], mx.array]] = {
    CodebookFormat: lambda packed, fmt: unpack(packed, fmt.bits),
    TrellisFormat: lambda packed, fmt: levels(packed, fmt.group_size, fmt.bits),
}
