"""The layout of grouped weights on an NVIDIA GPU: the same bits as on disk, ordered as tensor cores take them.

A tile is 32 rows; a unit is 128 inputs of a tile, ``bits`` times 16 bytes for each of 32 lanes, so that a warp reads whole
lines. Lane 4 * r + t holds, of rows r, r + 8, r + 16 and r + 24, the 32 cells c (cells.py) at inputs

    (c // L) * S + t * L + c % L,   S = min(group_size, 128), L = S / 4

plane after plane, each plane for all four rows before the next. Rows are padded to whole tiles and inputs to whole units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.kernels.cuda.cells import COUNT, Cells, Field, cells

ROWS, INPUTS = 32, 128
_CHUNK = 1 << 24  # codes unpacked at once


@dataclass(frozen=True)
class Tiled:
    """A weight [..., N, K] in tiles.

    Attributes:
        codes: int32 [..., tiles, units, bits, 32, 4].
        norms: float16 [..., tiles, groups, 8, 4]: rows r, r + 8, r + 16, r + 24.
    """

    codes: Tensor
    norms: Tensor


def padded(in_features: int, fmt: GroupedFormat) -> int:
    """Inputs in whole units and groups."""
    step = max(INPUTS, fmt.group_size)
    return -(-in_features // step) * step


def tile(packed: Tensor, norms: Tensor, fmt: GroupedFormat) -> Tiled:
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


def untile(tiled: Tiled, fmt: GroupedFormat, n: int, groups: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``tile``: packed uint8 [..., n, bytes] and norms [..., n, groups]."""
    lead = tiled.codes.shape[:-5]
    words = tiled.codes.reshape(-1, *tiled.codes.shape[-4:])
    count, units = words.shape[:2]
    flat = words.permute(0, 1, 3, 2, 4).reshape(count, units, 32, 4 * fmt.bits)
    made, kind = torch.zeros(count, units, 32, 4, COUNT, dtype=torch.uint8, device=words.device), cells(fmt)
    for begin, width, field in _fields(kind):
        plane = flat[..., 4 * begin : 4 * (begin + width)].view(count, units, 32, 4, width)
        for c, (word, position) in enumerate(field.places):
            part = plane[..., word] >> position
            if position + field.width > 32:  # the rest is in the next word
                part = part & (2 ** (32 - position) - 1) | plane[..., word + 1] << (32 - position)
            made[..., c] |= ((part & (2**field.width - 1)) << field.lowest).to(torch.uint8)
    back = _order(fmt.group_size, words.device).argsort()
    # [tile, unit, r, t, j, c] -> [tile, j, r, unit, t, c]
    made = (
        made.view(count, units, 8, 4, 4, COUNT).permute(0, 4, 2, 1, 3, 5).reshape(count, 4, 8, units, INPUTS)[..., back]
    )
    rows = made.reshape(*lead, -1, units * INPUTS)[..., :n, : groups * fmt.group_size]
    norms = tiled.norms.transpose(-3, -1).reshape(*lead, -1, tiled.norms.shape[-3])
    return codec.packed(kind.indices(rows), fmt), norms[..., :n, :groups].contiguous()


def _words(packed: Tensor, k: int, fmt: GroupedFormat) -> Tensor:
    """packed [T, 32, bytes] -> int32 [T, units, bits, 32, 4]"""
    kind = cells(fmt)
    made = kind.of(codec.indices(packed, fmt))
    made = F.pad(made, (0, k - made.shape[-1])).view(-1, 4, 8, k // INPUTS, INPUTS)
    made = made[..., _order(fmt.group_size, made.device)].view(-1, 4, 8, k // INPUTS, 4, COUNT)
    made = made.permute(0, 3, 2, 4, 1, 5).to(torch.int32)  # [T, unit, r, t, j, c]
    words = made.new_zeros(*made.shape[:-2], 4 * fmt.bits)
    for begin, width, field in _fields(kind):
        plane = words[..., 4 * begin : 4 * (begin + width)].view(*made.shape[:-1], width)
        for c, (word, position) in enumerate(field.places):
            part = (made[..., c] >> field.lowest) & (2**field.width - 1)
            plane[..., word] |= part << position
            if position + field.width > 32:
                plane[..., word + 1] |= part >> (32 - position)
    return words.view(*words.shape[:2], 32, fmt.bits, 4).transpose(2, 3)


def _fields(kind: Cells) -> Iterator[tuple[int, int, Field]]:
    """Of each plane and field: words of a row before the plane, words of a row in it, the field."""
    begin = 0
    for plane in kind.planes:
        for field in plane.fields:
            yield begin, plane.words, field
        begin += plane.words


@cache
def _order(group_size: int, device: torch.device) -> Tensor:
    """[128] the input of (t, c), t first."""
    sub = min(group_size, INPUTS)
    run = sub // 4
    t, c = torch.arange(4, device=device)[:, None], torch.arange(32, device=device)[None]
    return (c // run * sub + t * run + c % run).view(-1)
