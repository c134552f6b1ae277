"""What kernels look codes up in: the entries of a format's cells as int8 or float16, in the words of ``Table`` of decode.cuh."""

from __future__ import annotations

import torch

from kappaquant.kernels.cuda.cells import Cells

WIDE = 16
"""Entries beyond which a table lies in shared memory, a copy for each lane."""


def int8_table(cells: Cells) -> tuple[list[int], float]:
    """(table words, scale) with entry * scale near each value; where a sign is apart (entry + 1/2) * scale, so
    that the complement of an entry is its negative.

    The scale is searched: rounding the few values of 2 or 3 bits then costs hardly anything.
    """
    offset = 0.5 if cells.has_signs else 0.0
    wanted = torch.tensor(cells.entries, dtype=torch.float64)
    scales = wanted.abs().max() / torch.linspace(100, 127 + offset, 512, dtype=torch.float64)[:, None]
    entries = (wanted / scales - offset).round().clamp(-128, 127)
    best = int(((entries + offset) * scales - wanted).square().sum(1).argmin())
    found: list[int] = entries[best].to(torch.int64).tolist()
    if len(found) == 16:
        # The second eight and what the first are more, as decode_int8 wants them. Both are of one sign, magnitudes of a codebook's negative
        # half or neighbouring levels of a trellis's subsets, so that no difference exceeds 127.
        found = [second + 128 for second in found[8:]] + [a - b for a, b in zip(found[:8], found[8:], strict=True)]
    return _little_endian(found), float(scales[best])


def half_table(cells: Cells) -> tuple[list[int], float]:
    """(table words, scale): float16 entries, low and high bytes of each eight apart; wide tables have an entry a word."""
    scale = max(cells.fmt.codebook)
    entries = torch.tensor(cells.entries, dtype=torch.float64) / scale
    raw = [value & 0xFFFF for value in entries.to(torch.float16).view(torch.int16).tolist()]
    if len(raw) > WIDE:
        return raw, scale
    words: list[int] = []
    for start in range(0, len(raw), 8):
        eight = (raw[start : start + 8] + [0] * 8)[:8]
        words += _little_endian([v & 0xFF for v in eight]) + _little_endian([v >> 8 for v in eight])
    return words, scale


def shared_bytes(cells: Cells, half: bool) -> int:
    """Of the table that a thread block keeps in shared memory."""
    return 4 * 32 * len(cells.entries) if half and len(cells.entries) > WIDE else 0


def _little_endian(values: list[int]) -> list[int]:
    values = [value & 0xFF for value in values] + [0] * (-len(values) % 4)
    return [sum(value << 8 * i for i, value in enumerate(values[at : at + 4])) for at in range(0, len(values), 4)]
