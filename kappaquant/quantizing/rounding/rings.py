"""Trellis codes of one group of inputs, each weight making up for what those before it left: what ``groups`` is for codebooks.

A code is part of a path, which only its end decides. So every survivor of the Viterbi search carries its own errors, and its own targets
for the weights to come (per-survivor processing, Raheli, Polydoros & Tzou 1995). Plain torch, on any device; NVIDIA GPUs have kernels for it,
and CPUs the native core, whose sums are rounded otherwise.

Inside, arrays are [B, states, X]: X = tried * N rings side by side for each of B matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.formats import codec, trials
from kappaquant.formats.trellis import SUBSETS, TRELLIS, Trellis, TrellisFormat
from kappaquant.formats.viterbi import branches, first_least, held, trace
from kappaquant.kernels import dispatch

_FLOATS = {"cpu": 1 << 21, "cuda": 1 << 29}  # that survivors' errors take, roughly


def choose(block: Tensor, upper: Tensor, scales: Sequence[float], fmt: TrellisFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, norms and errors of a group, as ``groups.choose``."""
    if kernel := dispatch.trellis_feedback(block, fmt):
        codes, kept, errors = kernel.choose(block, upper, scales, fmt)
        return codes, kept, errors
    norms = trials.tried_norms(block, scales, fmt)
    codes, errors = feed(block, norms, upper, fmt)
    return trials.kept(codes, norms, errors)


def feed(block: Tensor, norms: Tensor, upper: Tensor, fmt: TrellisFormat) -> tuple[Tensor, Tensor]:
    """Codes on closed paths, the error of each weight spread over the inputs to come.

    Args:
        block: float32 [B, size, N].
        norms: float32 [tried, B, N], each tried by itself.
        upper: float32 [B, size, size], the group's part of the upper factor of H^-1.

    Returns:
        Level indices uint8 and errors over the factor's diagonal float32, both [size, tried, B, N].
    """
    count, size, rows = block.shape
    tried = len(norms)
    codes = torch.empty(size, tried, count, rows, dtype=torch.uint8, device=block.device)
    step = max(1, _FLOATS[block.device.type] // (2 * fmt.code.states * size * tried * count))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        targets = block[:, :, None, some].expand(-1, -1, tried, -1).flatten(2)
        scales = norms[..., some].transpose(0, 1).flatten(1)
        found = closed(targets, scales, upper, codec.centroids(fmt, block.device), fmt.code)
        codes[..., some] = found.view(count, size, tried, -1).permute(1, 2, 0, 3)
    values = codec.centroids(fmt, block.device)[codes.int()] * norms
    left = (block.transpose(0, 1)[:, None] - values).permute(2, 0, 1, 3)
    # codes given, errors e solve e U = left
    errors = torch.linalg.solve_triangular(upper.mT, left.flatten(2), upper=False)
    return codes, errors.view(count, size, tried, rows).permute(1, 2, 0, 3)


def closed(targets: Tensor, norms: Tensor, upper: Tensor, levels: Tensor, code: Trellis = TRELLIS) -> Tensor:
    """Level indices uint8 [B, size, X] for targets of that shape and norms [B, X]: paths closed as by ``viterbi.closest``."""
    count, size, width = targets.shape
    taken = torch.empty(size, count, code.states, width, dtype=torch.bool, device=targets.device)
    chosen = torch.empty_like(taken, dtype=torch.uint8)

    def round_of(cost: Tensor) -> Tensor:
        return _search(cost, targets, norms, upper, levels, code, taken, chosen)

    cost = round_of(round_of(targets.new_zeros(count, code.states, width)))
    _, start = trace(_flat(taken), first_least(cost.transpose(0, 1).flatten(1)))
    round_of(held(start, code).view(code.states, count, width).transpose(0, 1))
    path, _ = trace(_flat(taken), start)
    found, state = torch.empty_like(path), start
    for t in range(size):
        state = (state << 1 | path[t]) & (code.states - 1)
        found[t] = _flat(chosen[t : t + 1])[0].gather(0, state[None])[0]
    return found.view(size, count, width).transpose(0, 1)


def _flat(table: Tensor) -> Tensor:
    """[size, B, states, X] -> [size, states, B * X]."""
    return table.transpose(1, 2).flatten(2)


def _search(
    cost: Tensor,
    targets: Tensor,
    norms: Tensor,
    upper: Tensor,
    levels: Tensor,
    code: Trellis,
    taken: Tensor,
    chosen: Tensor,
) -> Tensor:
    """Costs [B, states, X] of the best paths to each state after one round from such costs.

    Args:
        taken, chosen: [size, B, states, X], set to where each survivor came from the upper state, and to the level that it took.
    """
    count, size, width = targets.shape
    states, half = code.states, code.states // 2
    choices, middles, first = _choices(levels, code)
    inverse = torch.where(norms == 0, 0.0, 1 / norms)[:, None]
    errors, spare = (targets.new_empty(count, size, states, width) for _ in range(2))  # of survivors
    for t in range(size):
        y = targets[:, t, None]
        if t:
            y = y - (upper[:, None, :t, t] @ errors[:, :t].flatten(2)).view(count, states, width)
        value, index = _nearest((y * inverse).expand(-1, states, -1)[:, :, None], choices, middles, first)
        error = (y[:, :, None] - value * norms[:, None, None]) / upper[:, t, t, None, None, None]
        low, high = (cost[:, :, None] + error.square()).view(count, 2, half, 2, width).unbind(1)
        better = high < low
        cost = torch.where(better, high, low).flatten(1, 2)
        taken[t] = better.flatten(1, 2)
        chosen[t] = _of(index.view(count, 2, half, 2, width), better)
        if t:
            before = errors[:, :t].view(count, t, 2, half, 1, width)
            after = spare[:, :t].view(count, t, half, 2, width)
            torch.where(better[:, None], before[:, :, 1], before[:, :, 0], out=after)
            errors, spare = spare, errors
        errors[:, t] = _of(error.view(count, 2, half, 2, width), better)
    return cost


def _of(pair: Tensor, better: Tensor) -> Tensor:
    """Of [B, 2, states / 2, 2, X], by the state before and a path bit, what each survivor has: [B, states, X]."""
    return torch.where(better, pair[:, 1], pair[:, 0]).flatten(1, 2)


def _nearest(z: Tensor, choices: Tensor, middles: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(values float32, level indices uint8), both [B, states, 2, X], of targets [B, states, 1, X]: of what a next path bit leaves."""
    value = choices[:, :, 0].expand(len(z), -1, -1, z.shape[-1])
    index = first.expand_as(value)
    for at in range(middles.shape[2]):
        over = z > middles[:, :, at]
        value = torch.where(over, choices[:, :, at + 1], value)
        index = index + over.to(torch.uint8) * SUBSETS
    return value, index


def _choices(levels: Tensor, code: Trellis) -> tuple[Tensor, Tensor, Tensor]:
    """For each state and next path bit the levels to choose from, [states, 2, 2**(bits - 1), 1], their middles, and the first's index."""
    low, high = branches(code, levels.device)
    subset = torch.cat([low, high]).view(code.states, 2)  # by the oldest bit, the others, and the next
    choices = levels.view(-1, SUBSETS)[:, subset].permute(1, 2, 0)
    middles = (choices[..., 1:] + choices[..., :-1]) / 2
    return choices[..., None], middles[..., None], subset.to(torch.uint8)[..., None]
