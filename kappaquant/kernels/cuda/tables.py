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
    return _little_endian(_by_eights(entries[best].to(torch.int64).tolist())), float(scales[best])


def half_table(cells: Cells) -> tuple[list[int], float]:
    """(table words, scale): float16 entries, low and high bytes of each eight apart; wide tables have an entry a word.

    Of 16 entries the scale is searched for which float16 is nearest among those whose pairs ``_by_eights`` takes.
    """
    wanted = torch.tensor(cells.entries, dtype=torch.float64)
    largest = float(wanted.abs().max())
    scales = largest * torch.linspace(1, 2, 4096, dtype=torch.float64)[: None if len(wanted) == WIDE else 1, None]
    entries = (wanted / scales).to(torch.float16)
    errors = (entries.double() * scales - wanted).square().sum(1)
    raw = entries.view(torch.int16).to(torch.int64) & 0xFFFF
    if len(wanted) == WIDE:
        errors = errors.masked_fill(((raw[:, :8] ^ raw[:, 8:]) & 0x8080).any(1), torch.inf)
    best = int(errors.argmin())
    found: list[int] = raw[best].tolist()
    if len(found) > WIDE:
        return found, float(scales[best])
    words: list[int] = []
    found = _by_eights(found)
    for start in range(0, len(found), 8):
        eight = (found[start : start + 8] + [0] * 8)[:8]
        words += _little_endian([v & 0xFF for v in eight]) + _little_endian([v >> 8 for v in eight])
    return words, float(scales[best])


def _by_eights(entries: list[int]) -> list[int]:
    """Of 16 entries the second eight, and what turns them into the first by exclusive or, as decode.cuh wants them: the highest bit of no byte,
    for pairs are of one sign, magnitudes of a codebook's negative half or neighbouring levels of a trellis's subsets."""
    if len(entries) != WIDE:
        return entries
    return entries[8:] + [a ^ b for a, b in zip(entries[:8], entries[8:], strict=True)]


def shared_bytes(cells: Cells, half: bool) -> int:
    """Of the table that a thread block keeps in shared memory."""
    return 4 * 32 * len(cells.entries) if half and len(cells.entries) > WIDE else 0


def _little_endian(values: list[int]) -> list[int]:
    values = [value & 0xFF for value in values] + [0] * (-len(values) % 4)
    return [sum(value << 8 * i for i, value in enumerate(values[at : at + 4])) for at in range(0, len(values), 4)]
