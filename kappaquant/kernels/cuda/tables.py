"""What kernels look codes up in: the entries of a format's cells as int8 or float16, in the words of ``Table`` of decode.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cuda.cells import Cells

WIDE = 16
"""Entries beyond which a table lies in shared memory, a copy for each lane."""


def int8_table(cells: Cells) -> tuple[list[int], float]:
    """(table words, scale) with entry * scale near each value; where a sign is apart (entry + 1/2) * scale, so
    that the complement of an entry is its negative.

    The scale is searched: rounding the few values of 2 or 3 bits then costs hardly anything.

    Raises:
        UnsupportedError: see ``half_table``.
    """
    offset = 0.5 if cells.has_signs else 0.0
    wanted = torch.tensor(cells.entries, dtype=torch.float64)
    scales = wanted.abs().max() / torch.linspace(100, 127 + offset, 512, dtype=torch.float64)[:, None]
    entries = (wanted / scales - offset).round().clamp(-128, 127)
    errors = ((entries + offset) * scales - wanted).square().sum(1)
    best = _best(entries.to(torch.int64), errors, 0x80)
    return _little_endian(_by_eights(entries[best].to(torch.int64).tolist())), float(scales[best])


def half_table(cells: Cells) -> tuple[list[int], float]:
    """(table words, scale): float16 entries, low and high bytes of each eight apart; wide tables have an entry a word.

    Of 16 entries the scale is searched for which float16 is nearest.

    Raises:
        UnsupportedError: at no scale can one of 16 entries be turned into another as decode.cuh does it.
    """
    wanted = torch.tensor(cells.entries, dtype=torch.float64)
    largest = float(wanted.abs().max())
    scales = largest * torch.linspace(1, 2, 4096, dtype=torch.float64)[: None if len(wanted) == WIDE else 1, None]
    entries = (wanted / scales).to(torch.float16)
    errors = (entries.double() * scales - wanted).square().sum(1)
    raw = entries.view(torch.int16).to(torch.int64) & 0xFFFF
    best = _best(raw, errors, 0x8080)
    found: list[int] = raw[best].tolist()
    if len(found) > WIDE:
        return found, float(scales[best])
    words: list[int] = []
    found = _by_eights(found)
    for start in range(0, len(found), 8):
        eight = (found[start : start + 8] + [0] * 8)[:8]
        words += _little_endian([v & 0xFF for v in eight]) + _little_endian([v >> 8 for v in eight])
    return words, float(scales[best])


def _best(entries: Tensor, errors: Tensor, highest: int) -> int:
    """Of entries [scales, count] the row of least error; of 16 only those whose pairs differ in no byte's highest bit are meant: those of sign are
    the same, since pairs are magnitudes of a codebook's negative half, or neighbouring levels of a trellis's subsets."""
    if entries.shape[1] == WIDE:
        errors = errors.masked_fill(((entries[:, :8] ^ entries[:, 8:]) & highest).any(1), torch.inf)
    best = int(errors.argmin())
    if not errors[best].isfinite():
        raise UnsupportedError(
            "of its entries some differ from those eight further in a highest bit, whatever the scale"
        )
    return best


def _by_eights(entries: list[int]) -> list[int]:
    """Of 16 entries the second eight, and what turns them into the first by exclusive or, as decode.cuh wants them."""
    if len(entries) != WIDE:
        return entries
    return entries[8:] + [a ^ b for a, b in zip(entries[:8], entries[8:], strict=True)]


def unfit(cells: Cells) -> str | None:
    """Why there are no tables of these cells, or None."""
    try:
        half_table(cells)
        if len(cells.entries) <= WIDE:
            int8_table(cells)
    except UnsupportedError as problem:
        return str(problem)
    return None


def shared_bytes(cells: Cells, half: bool) -> int:
    """Of the table that a thread block keeps in shared memory."""
    return 4 * 32 * len(cells.entries) if half and len(cells.entries) > WIDE else 0


def _little_endian(values: list[int]) -> list[int]:
    values = [value & 0xFF for value in values] + [0] * (-len(values) % 4)
    return [sum(value << 8 * i for i, value in enumerate(values[at : at + 4])) for at in range(0, len(values), 4)]
