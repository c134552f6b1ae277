"""Trellis codes in plain torch: which level each weight gets, and how rings lie in bytes. The truth for every faster encoder.

Arrays are [group_size, M], M rings side by side. States are the path bits that a trellis remembers, the newest lowest. All operations
are elementwise or look-ups, and ties have a rule, so that codes depend neither on the block size nor on the device.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from kappaquant.formats.search import Rounding
from kappaquant.formats.trellis import INVERSE, SUBSETS, TRELLIS, Trellis

# Relative to the group norm: what effort "best" tries, by the cost of an open path; twice as many gain 0.7 % of the error at 3 bits.
SCALES = (0.9, 1.0, 1.1, 1.2)
_RINGS = {"cpu": 1 << 10, "cuda": 1 << 15}  # searched together: a step's costs stay in a core's cache


class RingRounding(Rounding):
    """Codes of whole rings: level indices on a path of least squared error that closes, or nearly the least.

    An open search goes round twice, after which its best path has forgotten where it began; the state in which that path enters the
    second round is then held at both ends of one last round. Of rings of 128 nine in ten are the best there are.
    """

    def __init__(
        self, group_size: int, count: int, device: torch.device, levels: tuple[float, ...], code: Trellis = TRELLIS
    ) -> None:
        super().__init__(group_size, count, device)
        self.codes = torch.empty(group_size, count, dtype=torch.uint8, device=device)
        self.centroids = torch.empty(group_size, count, device=device)
        self._levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self._code = code

    def choose(self, y: Tensor) -> None:
        for start in range(0, y.shape[1], rings_at_once(y.device)):
            some = slice(start, start + rings_at_once(y.device))
            self.codes[:, some] = closest(y[:, some].contiguous(), self._levels, self._code)
        torch.index_select(self._levels, 0, self.codes.view(-1).int(), out=self.centroids.view(-1))

    def best_scale(self, y: Tensor) -> Tensor:
        best = y.new_full(y.shape[1:], math.inf)
        scale = torch.ones_like(best)
        for start in range(0, y.shape[1], rings_at_once(y.device)):
            some = slice(start, start + rings_at_once(y.device))
            for candidate in SCALES:
                squares, _ = subset_levels(y[:, some] * candidate, self._levels)
                least = walk(no_cost(squares, self._code), squares, self._code).amin(0)
                lost = least / y.new_tensor(candidate * candidate)  # CUDA multiplies by the reciprocal of a number
                better = lost < best[some]
                best[some] = torch.where(better, lost, best[some])
                scale[some] = torch.where(better, candidate, scale[some])
        return scale


def rings_at_once(device: torch.device) -> int:
    """How many rings a search takes at once; more change no code."""
    return _RINGS["cpu" if device.type == "cpu" else "cuda"]


def closest(x: Tensor, levels: Tensor, code: Trellis = TRELLIS) -> Tensor:
    """Level indices uint8 [size, M] on closed paths for targets float32 [size, M]."""
    squares, indices = subset_levels(x, levels)
    taken = torch.empty(len(x), code.states, x.shape[1], dtype=torch.bool, device=x.device)
    cost = walk(walk(no_cost(squares, code), squares, code), squares, code, taken)
    _, start = trace(taken, first_least(cost))
    walk(held(start, code), squares, code, taken)
    path, _ = trace(taken, start)
    return indices.gather(1, subsets(path, code).long()[:, None]).squeeze(1)


def subset_levels(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(squared distances float32, level indices uint8), both [size, 4, M]: of each subset the nearest level, the lower of two."""
    squares = x.new_empty(len(x), SUBSETS, x.shape[1])
    indices = torch.empty_like(squares, dtype=torch.uint8)
    middles = (levels[SUBSETS:] + levels[:-SUBSETS]) / 2
    for subset in range(SUBSETS):
        level, index = levels[subset], torch.full_like(x, subset, dtype=torch.uint8)
        for above in range(subset, len(middles), SUBSETS):
            over = x > middles[above]
            level = torch.where(over, levels[above + SUBSETS], level)
            index += over.to(torch.uint8) * SUBSETS
        squares[:, subset] = (x - level).square_()
        indices[:, subset] = index
    return squares, indices


def walk(cost: Tensor, squares: Tensor, code: Trellis = TRELLIS, taken: Tensor | None = None) -> Tensor:
    """Costs of the best paths to each state, float32 [states, M], after one round from such costs.

    Args:
        squares: [size, 4, M], what each subset costs at each weight.
        taken: bool [size, states, M], set to where a path came from the upper of two states, the one that differs in the oldest bit.
    """
    low_subset, high_subset = branches(code, cost.device)
    half = code.states // 2
    cost = cost.clone()
    low, high = torch.empty_like(cost), torch.empty_like(cost)
    for t, square in enumerate(squares):
        for came, subset, before in ((low, low_subset, cost[:half]), (high, high_subset, cost[half:])):
            torch.index_select(square, 0, subset, out=came)
            came.view(half, 2, -1).add_(before[:, None])
        if taken is not None:
            torch.lt(high, low, out=taken[t])
        torch.minimum(low, high, out=cost)
    return cost


def trace(taken: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(path bits uint8 [size, M], the state before them int64 [M]) of the best path that ends in a state [M]."""
    path = torch.empty(len(taken), taken.shape[2], dtype=torch.uint8, device=taken.device)
    for t in range(len(taken) - 1, -1, -1):
        path[t] = state & 1
        upper = taken[t].gather(0, state[None])[0]
        state = (state >> 1) + upper * (taken.shape[1] // 2)
    return path, state


def no_cost(squares: Tensor, code: Trellis = TRELLIS) -> Tensor:
    """Costs float32 [states, M] of paths that may begin anywhere."""
    return squares.new_zeros(code.states, squares.shape[2])


def held(state: Tensor, code: Trellis = TRELLIS) -> Tensor:
    """Costs float32 [states, M] of paths that begin in one state [M]."""
    return torch.full((code.states, len(state)), math.inf, device=state.device).scatter_(0, state[None], 0.0)


def first_least(cost: Tensor) -> Tensor:
    """The state of least cost, int64 [M], the lowest of several."""
    states = torch.arange(len(cost), device=cost.device)[:, None]
    return torch.where(cost == cost.amin(0), states, len(cost)).amin(0)


def subsets(path: Tensor, code: Trellis = TRELLIS) -> Tensor:
    """The subset that the ring leaves each weight: path bits uint8 [size, M] -> 0 to 3, uint8 [size, M]."""
    return _parity(path, code.lower) | _parity(path, code.upper) << 1


def path_of(indices: Tensor, inverse: tuple[tuple[int, ...], tuple[int, ...]] = INVERSE) -> Tensor:
    """The path bits of level indices on rings, both uint8 [size, M]; ``inverse`` as in ``pack_block``."""
    return _parity(indices & 1, inverse[0]) ^ _parity(indices >> 1 & 1, inverse[1])


def pack_block(indices: Tensor, bits: int, inverse: tuple[tuple[int, ...], tuple[int, ...]] = INVERSE) -> Tensor:
    """uint8 level indices [D, M], which lie on rings -> bytes [D * bits / 8, M]: D path bits, then D of each bit above the subset's.

    Args:
        inverse: of the trellis, as ``INVERSE`` is that of ``TRELLIS``.
    """
    planes = torch.cat([path_of(indices, inverse), *(indices >> (2 + k) & 1 for k in range(bits - 1))])
    eight = planes.view(-1, 8, indices.shape[1])
    packed = eight[:, 0].clone()
    for k in range(1, 8):
        packed |= eight[:, k] << k
    return packed


def unpack_block(packed: Tensor, bits: int, code: Trellis = TRELLIS) -> Tensor:
    """Inverse of ``pack_block``: bytes [D * bits / 8, M] -> uint8 level indices [D, M]."""
    planes = torch.stack([packed >> k & 1 for k in range(8)], 1).view(bits, -1, packed.shape[1])
    indices = subsets(planes[0], code)
    for k in range(1, bits):
        indices |= planes[k] << (k + 1)
    return indices


@cache
def branches(code: Trellis, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each state the subset of the step into it from the lower, and from the upper, of the two states before it: int64 [states]."""

    def subset(window: int) -> int:
        lower, upper = (sum(window >> back for back in backs) & 1 for backs in (code.lower, code.upper))
        return lower + 2 * upper

    # a window is the new state's bits, and above them the one that it forgets
    low, high = (
        torch.tensor([subset(state + forgotten * code.states) for state in range(code.states)], device=device)
        for forgotten in (0, 1)
    )
    return low, high


def _parity(bits: Tensor, backs: tuple[int, ...]) -> Tensor:
    found = torch.zeros_like(bits)
    for back in backs:
        found ^= bits.roll(back, 0)
    return found
