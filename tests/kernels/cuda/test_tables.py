"""Tables of entries are near the codebook; where each entry is looked up, test_cells.py checks."""

from __future__ import annotations

import struct

import pytest
import torch
from gpu_products import INT8_NAMES, NAMES, both_eights, int8_values, named

from kappaquant.kernels.cuda import tables
from kappaquant.kernels.cuda.cells import cells


def table_bytes(words: list[int]) -> list[int]:
    return list(struct.pack(f"<{len(words)}I", *words))


@pytest.mark.parametrize("name", INT8_NAMES)
def test_int8_tables_are_near_the_codebook(name: str) -> None:
    fmt = named(name)
    book = torch.tensor(fmt.codebook, dtype=torch.float64)
    assert float((int8_values(fmt) - book).norm() / book.norm()) < 0.005


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
        pairs = both_eights(pairs)
        assert tables.shared_bytes(kind, True) == 0
    made = [struct.unpack("<e", struct.pack("<H", pair))[0] * scale for pair in pairs][: len(kind.entries)]
    made = sorted([*made, *(-m for m in made)] if kind.has_signs else made)
    assert made == pytest.approx(kind.fmt.codebook, rel=1e-3)


def test_entries_that_cannot_be_turned_into_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = cells(named("t4"))
    assert tables.unfit(kind) is None
    monkeypatch.setattr(kind, "entries", (-kind.entries[0], *kind.entries[1:]))  # of another sign than its pair
    assert "some differ from those eight further in a highest bit" in str(tables.unfit(kind))
