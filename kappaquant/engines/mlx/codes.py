"""The codec's decoding side in plain MLX operations, for any MLX device. ``kappaquant.formats.codec`` is the truth.

Shapes: packed uint8 [..., G * bytes_per_group], norms [..., G], codebook float32 [2**bits].
"""

from __future__ import annotations

import mlx.core as mx

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.signs import signs


def rotate(x: mx.array, group_size: int) -> mx.array:
    """s2 * H(s1 * x) for each group of the last axis: [..., in] -> float32 [..., G * group_size], zero-padded."""
    s1, s2 = (mx.array(s, dtype=mx.float32) for s in signs(group_size))
    y = _groups(x.astype(mx.float32), group_size)
    return (mx.hadamard_transform(y * s1) * s2).flatten(-2)


def unrotate(y: mx.array, group_size: int) -> mx.array:
    """Inverse of ``rotate``: s1 * H(s2 * y), float32 [..., G * group_size]."""
    s1, s2 = (mx.array(s, dtype=mx.float32) for s in signs(group_size))
    return (mx.hadamard_transform(_groups(y, group_size) * s2) * s1).flatten(-2)


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


def decode_rotated(packed: mx.array, norms: mx.array, codebook: mx.array, fmt: CodebookFormat) -> mx.array:
    """norm * c[code], the weight's rotation: float32 [..., G * group_size]. Its product with ``rotate(x)`` is x . w."""
    values = _groups(codebook[unpack(packed, fmt.bits)], fmt.group_size)
    return (values * norms[..., None].astype(mx.float32)).flatten(-2)


def decode(packed: mx.array, norms: mx.array, codebook: mx.array, fmt: CodebookFormat, in_features: int) -> mx.array:
    """The weight itself, float32 [..., in_features]."""
    return unrotate(decode_rotated(packed, norms, codebook, fmt), fmt.group_size)[..., :in_features]


def _groups(x: mx.array, group_size: int) -> mx.array:
    missing = -x.shape[-1] % group_size
    if missing:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, group_size)
