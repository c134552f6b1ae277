"""Weights that encoders get wrong first."""

from __future__ import annotations

import torch
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.trellis import SUBSETS, TrellisFormat


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard(fmt: GroupedFormat) -> Tensor:
    """A row with its last group cut for each: Gaussian, long tails, zeros, tiny, large, constant, and some on thresholds."""
    group = fmt.group_size
    width = 3 * group - 7
    plain = numbers(7, width, seed=group)
    c, apart = torch.tensor(fmt.codebook), SUBSETS if isinstance(fmt, TrellisFormat) else 1
    exact = ((c[apart:] + c[:-apart]) / 2)[
        torch.randint(len(c) - apart, (1, 3 * group), generator=torch.Generator().manual_seed(6))
    ]
    factors = torch.tensor([1.0, 1.0, 0.0, 1e-20, 3e-23, 300.0, 0.0])[:, None]
    rows = plain * factors
    rows[1] *= torch.exp(2 * numbers(width, seed=7))
    rows[6] = 0.25
    return torch.cat([rows, codec.unrotate(exact, group)[:, :width]])
