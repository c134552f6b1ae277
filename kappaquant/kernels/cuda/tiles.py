"""The layout of codebook weights on an NVIDIA GPU: the same bits as on disk, ordered as tensor cores take them.

A tile is 32 rows; a unit is 128 inputs of a tile, ``bits`` times 16 bytes for each of 32 lanes, so that a warp reads whole
lines. Lane 4 * r + t holds, of rows r, r + 8, r + 16 and r + 24, the 32 codes c at inputs

    (c // L) * S + t * L + c % L,   S = min(group_size, 128), L = S / 4

as bit planes of 4, 2 and 1 bits (from 6 bits on, one dense bitstream), each plane for all four rows before the next. Rows are padded to
whole tiles and inputs to whole units. Codes of 4 and 5 bits are stored as sign and magnitude, for a codebook is symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat

ROWS, INPUTS = 32, 128
_CHUNK = 1 << 24  # codes unpacked at once

# (width, lowest bit of the code) of each plane
_PLANES = {
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((6, 0),),
    7: ((7, 0),),
    8: ((8, 0),),
}


@dataclass(frozen=True)
class Tiled:
    """A weight [..., N, K] in tiles.

    Attributes:
        codes: int32 [..., tiles, units, bits, 32, 4].
        norms: float16 [..., tiles, groups, 8, 4]: rows r, r + 8, r + 16, r + 24.
    """

    codes: Tensor
    norms: Tensor


def padded(in_features: int, fmt: CodebookFormat) -> int:
    """Inputs in whole units and groups."""
    step = max(INPUTS, fmt.group_size)
    return -(-in_features // step) * step


def tile(packed: Tensor, norms: Tensor, fmt: CodebookFormat) -> Tiled:
    """Order packed uint8 [..., N, bytes] and float16 norms [..., N, G] as tiles, a few rows at a time."""
    *lead, n, groups = norms.shape
    k = padded(groups * fmt.group_size, fmt)
    tiles, units = -(-n // ROWS), k // INPUTS
    codes = torch.empty(math.prod(lead) * tiles, units, fmt.bits, 32, 4, dtype=torch.int32, device=packed.device)
    wide = F.pad(norms, (0, k // fmt.group_size - groups, 0, tiles * ROWS - n)).reshape(-1, 4, 8, k // fmt.group_size)
    rows = F.pad(packed, (0, 0, 0, tiles * ROWS - n)).reshape(-1, ROWS, packed.shape[-1])
    step = max(1, _CHUNK // (ROWS * k))
    for start in range(0, len(rows), step):
        codes[start : start + step] = _words(rows[start : start + step], k, fmt)
    scales = wide.permute(0, 3, 2, 1).contiguous().view(*lead, tiles, k // fmt.group_size, 8, 4)
    if codes.is_cuda:
        torch.cuda.synchronize(codes.device)  # kernels read weights before they wait for earlier kernels
    return Tiled(codes.view(*lead, tiles, units, fmt.bits, 32, 4), scales)


def untile(tiled: Tiled, fmt: CodebookFormat, n: int, groups: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``tile``: packed uint8 [..., n, bytes] and norms [..., n, groups]."""
    lead = tiled.codes.shape[:-5]
    words = tiled.codes.reshape(-1, *tiled.codes.shape[-4:])
    count, units = words.shape[:2]
    flat = words.permute(0, 1, 3, 2, 4).reshape(count, units, 32, 4 * fmt.bits)
    code = torch.zeros(count, units, 32, 4, 32, dtype=torch.uint8, device=words.device)
    begin = 0
    for (width, lowest), places in zip(_PLANES[fmt.bits], _places(fmt.bits), strict=True):
        plane = flat[..., 4 * begin : 4 * (begin + width)].view(count, units, 32, 4, width)
        for c, (word, position) in enumerate(places):
            part = plane[..., word] >> position
            if position + width > 32:  # the rest is in the next word
                part = part & (2 ** (32 - position) - 1) | plane[..., word + 1] << (32 - position)
            code[..., c] |= ((part & (2**width - 1)) << lowest).to(torch.uint8)
        begin += width
    code = _swap_signs(code, fmt.bits)
    back = _order(fmt.group_size, words.device).argsort()
    # [tile, unit, r, t, j, c] -> [tile, j, r, unit, t, c]
    code = code.view(count, units, 8, 4, 4, 32).permute(0, 4, 2, 1, 3, 5).reshape(count, 4, 8, units, 128)[..., back]
    rows = code.reshape(*lead, -1, units * INPUTS)[..., :n, : groups * fmt.group_size]
    norms = tiled.norms.transpose(-3, -1).reshape(*lead, -1, tiled.norms.shape[-3])
    return codec.pack(rows, fmt.bits), norms[..., :n, :groups].contiguous()


def _words(packed: Tensor, k: int, fmt: CodebookFormat) -> Tensor:
    """packed [T, 32, bytes] -> int32 [T, units, bits, 32, 4]"""
    codes = codec.unpack(packed, fmt.bits)
    codes = F.pad(codes, (0, k - codes.shape[-1])).view(-1, 4, 8, k // INPUTS, INPUTS)
    codes = codes[..., _order(fmt.group_size, codes.device)].view(-1, 4, 8, k // INPUTS, 4, 32)
    codes = _swap_signs(codes.permute(0, 3, 2, 4, 1, 5), fmt.bits).to(torch.int32)  # [T, unit, r, t, j, c]
    planes = []
    for (width, lowest), places in zip(_PLANES[fmt.bits], _places(fmt.bits), strict=True):
        plane = codes.new_zeros(*codes.shape[:-1], width)
        for c, (word, position) in enumerate(places):
            part = (codes[..., c] >> lowest) & (2**width - 1)
            plane[..., word] |= part << position
            if position + width > 32:
                plane[..., word + 1] |= part >> (32 - position)
        planes.append(plane.flatten(-2))
    flat = torch.cat(planes, dim=-1)
    return flat.view(*flat.shape[:2], 32, fmt.bits, 4).transpose(2, 3)


def _swap_signs(codes: Tensor, bits: int) -> Tensor:
    """Ascending index to sign (top bit, set if positive) and magnitude, and back: the same map both ways."""
    if bits not in (4, 5):
        return codes
    half = 2 ** (bits - 1)
    return torch.where(codes >= half, codes, half - 1 - codes)


@cache
def _order(group_size: int, device: torch.device) -> Tensor:
    """[128] the input of (t, c), t first."""
    sub = min(group_size, INPUTS)
    run = sub // 4
    t, c = torch.arange(4, device=device)[:, None], torch.arange(32, device=device)[None]
    return (c // run * sub + t * run + c % run).view(-1)


@cache
def _places(bits: int) -> list[list[tuple[int, int]]]:
    """For each plane, the (word, lowest bit) of codes 0..31; as ``decode.cuh`` reads them."""
    found = []
    for width, _ in _PLANES[bits]:
        places = []
        for c in range(32):
            q, j = divmod(c, 4)
            nibble, part = q % 2 * 4 + j, q % 4 // 2
            if width > 4:
                places.append(divmod(width * c, 32))
            elif width == 4:
                places.append((q // 2, 4 * nibble))
            elif width == 2:
                places.append((q // 4, 4 * nibble + 2 * part))
            elif bits == 5:
                places.append((0, 8 * j + 7 - q))
            else:
                places.append((0, 4 * nibble + (2 - part if q < 4 else 3 - 3 * part)))
        found.append(places)
    return found


def int8_table(codebook: Sequence[float], bits: int) -> tuple[list[int], float]:
    """(table words, scale) with entry * scale near each centroid; for 4 and 5 bits (entry + 1/2) * scale, so
    that the complement of an entry is its negative.

    The scale is searched: rounding the few centroids of 2 or 3 bits then costs hardly anything.
    """
    offset = 0.5 if bits > 3 else 0.0
    wanted = torch.tensor(_entries(codebook, bits), dtype=torch.float64)
    scales = wanted.abs().max() / torch.linspace(100, 127 + offset, 512, dtype=torch.float64)[:, None]
    entries = (wanted / scales - offset).round().clamp(-128, 127)
    best = int(((entries + offset) * scales - wanted).square().sum(1).argmin())
    return _little_endian(entries[best].to(torch.int64).tolist()), float(scales[best])


def half_table(codebook: Sequence[float], bits: int) -> tuple[list[int], float]:
    """(table words, scale): float16 entries, their low bytes and high bytes apart up to 5 bits, one a word above."""
    scale = max(codebook)
    entries = torch.tensor(_entries(codebook, bits), dtype=torch.float64) / scale
    raw = [value & 0xFFFF for value in entries.to(torch.float16).view(torch.int16).tolist()]
    if bits > 5:
        return raw, scale
    words: list[int] = []
    for start in range(0, len(raw), 8):
        eight = (raw[start : start + 8] + [0] * 8)[:8]
        words += _little_endian([v & 0xFF for v in eight]) + _little_endian([v >> 8 for v in eight])
    return words, scale


def _entries(codebook: Sequence[float], bits: int) -> Sequence[float]:
    """What a table is indexed with: magnitudes of the negative half for 4 and 5 bits, else the whole codebook."""
    return codebook[len(codebook) // 2 - 1 :: -1] if bits in (4, 5) else codebook


def _little_endian(values: list[int]) -> list[int]:
    values = [value & 0xFF for value in values] + [0] * (-len(values) % 4)
    return [sum(value << 8 * i for i, value in enumerate(values[at : at + 4])) for at in range(0, len(values), 4)]
