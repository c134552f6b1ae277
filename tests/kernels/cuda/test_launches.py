"""How many thread blocks share an input axis: only those that would leave the card idle, and only where it pays."""

from __future__ import annotations

import pytest

from kappaquant.kernels.cuda.launches import split_of, whole_blocks

H100 = 132


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize("units", [1, 4, 8, 16, 64])
def test_split(units: int, resident: int) -> None:
    for blocks in range(1, 5 * H100):
        split = split_of(blocks, units, H100, resident)
        assert split in (1, 2, 4, 8)
        assert split == 1 or units // split >= 4, "a share of fewer than four units"
        slots = H100 * resident
        if blocks < slots:
            assert split * blocks <= slots
            assert split <= 2 or split * blocks <= H100
        elif split > 1:
            assert split * (blocks % slots) <= slots


def test_examples() -> None:
    assert [split_of(blocks, 64, H100, 1) for blocks in (1, 16, 17, 33, 34, 66, 67, 132, 133, 200)] == [
        8, 8, 4, 4, 2, 2, 1, 1, 2, 1,
    ]  # fmt: skip
    assert split_of(64, 64, H100, 2) == 2, "blocks two a multiprocessor go in pairs, not in fours"


@pytest.mark.parametrize("split", [1, 2, 4])
def test_whole_blocks_fill_the_card_or_are_all(split: int) -> None:
    for blocks in range(1, 700):
        whole = whole_blocks(blocks, split, H100)
        assert 0 <= whole <= blocks
        assert whole % split == 0
        rest = blocks % H100
        if rest * split <= H100:
            assert whole == blocks // H100 * H100 // split * split
        else:
            assert blocks - whole < split
