"""How products of many tokens, and those of experts, are spread over a GPU, whatever the inputs are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BARRIER_BYTES = 128  # of shared memory
TARGET_BYTES = 8  # for each token: what its sums are multiplied by, and where they go


@dataclass(frozen=True)
class Spread:
    """The part of a launch that float16 and int8 inputs have in common.

    Attributes:
        tokens: of a thread block.
        warpgroups: of a thread block.
        split: thread blocks of a cluster that share the input axis, where they would not fill the card once more.
        stages: units of the input on their way to shared memory or in it.
        resident: thread blocks that a multiprocessor must hold, which bounds registers.
    """

    tokens: int
    warpgroups: int
    split: int
    stages: int
    resident: int

    @property
    def paired(self) -> bool:
        """Whether two thread blocks of a cluster, neighbours in rows, fetch inputs for each other."""
        return False


@dataclass(frozen=True)
class Items:
    """Work of experts: each thread block multiplies the tokens of one item.

    Attributes:
        work: int32 [items, 4]: expert, first position (a multiple of 8), positions (0: none), 0.
        rows_of: int32 [positions]: the output row of each.
        rows: of the output.
    """

    work: Tensor
    rows_of: Tensor
    rows: int


def split_of(blocks: int, units: int, multiprocessors: int, resident: int) -> int:
    """How many may share the input axis of the blocks that do not fill the card once more.

    Shares of fewer than four units do not pay. Clusters of more than two do not find a place for all of their blocks: a card
    that is to hold two blocks a multiprocessor is half as slow again with 256 blocks in clusters of four as with 128 in pairs.
    """
    slots = multiprocessors * resident
    if blocks >= slots:
        tail = blocks % slots
        return 2 if 0 < 2 * tail <= slots and units >= 8 else 1
    split = 1
    while split < 8 and 2 * split * blocks <= (slots if split == 1 else multiprocessors) and 8 * split <= units:
        split *= 2
    return split


def whole_blocks(blocks: int, split: int, slots: int) -> int:
    """How many of them are not split: those that fill the card, or all if the others would not fit once; in whole clusters."""
    fits = blocks % slots * split <= slots
    return (blocks // slots * slots if fits else blocks) // split * split
