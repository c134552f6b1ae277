"""Tables of entries are near the codebook; where each entry is looked up, test_cells.py checks."""

from __future__ import annotations

import struct

import pytest
import torch
from gpu_products import INT8_NAMES, NAMES, named

from kappaquant.kernels.cuda import tables
from kappaquant.kernels.cuda.cells import cells


def table_bytes(words: list[int]) -> list[int]:
    return list(struct.pack(f"<{len(words)}I", *words))


@pytest.mark.parametrize("name", INT8_NAMES)
def test_int8_tables_are_near_the_codebook(name: str) -> None:
    kind = cells(named(name))
    words, scale = tables.int8_table(kind)
    raw = table_bytes(words)[: len(kind.entries)]
    if len(raw) == 16:  # the second eight plus 128, and what the first are more
        second = [b - 128 for b in raw[:8]]
        entries = [s + more for s, more in zip(second, raw[8:], strict=True)] + second
    else:
        entries = [b - 256 if b > 127 else b for b in raw]
    made = torch.tensor(entries, dtype=torch.float64)
    made = torch.cat([(made + 0.5), (-1 - made + 0.5)] if kind.has_signs else [made]) * scale  # ~entry is -1 - entry
    book = torch.tensor(kind.fmt.codebook, dtype=torch.float64)
    assert float((made.sort().values - book).norm() / book.norm()) < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_float16_tables_hold_the_codebook(name: str) -> None:
    kind = cells(named(name))
    words, scale = tables.half_table(kind)
    if len(words) > tables.WIDE:
        pairs = words
        assert tables.shared_bytes(kind, True) == 128 * len(words)
    else:
        raw = table_bytes(words)
        pairs = [raw[at + i] | raw[at + 8 + i] << 8 for at in range(0, len(raw), 16) for i in range(8)]
        assert tables.shared_bytes(kind, True) == 0
    made = [struct.unpack("<e", struct.pack("<H", pair))[0] * scale for pair in pairs][: len(kind.entries)]
    made = sorted([*made, *(-m for m in made)] if kind.has_signs else made)
    assert made == pytest.approx(kind.fmt.codebook, rel=1e-3)
