"""Norms that calibrated rounding tries for a group, and which of them is kept: in torch, for every device to give the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.formats import codec
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.search import Products


def tried_norms(block: Tensor, scales: Sequence[float], fmt: GroupedFormat) -> Tensor:
    """Multiples of each row's least-squares norm at the scale that explains most of it, as effort "best" finds it.

    Args:
        block: float32 [B, size, N], one group of rotated inputs of B matrices.

    Returns:
        float32 [scales, B, N], of values that the stored dtype holds: chosen before the codes, which then make up for the rounding.
    """
    columns = block.transpose(0, 1).reshape(fmt.group_size, -1)
    rounding = fmt.rounding(columns.shape[1], block.device)
    # as the codec does it: the root of a CPU may be a digit off
    norm = rounding.dot(columns, columns).double().sqrt().float()
    unit = columns / torch.where(norm == 0, 1.0, norm)
    rounding.choose(unit * rounding.best_scale(unit))
    dot = rounding.dot(unit, rounding.centroids).clone()
    plain = norm * (dot / rounding.dot(rounding.centroids, rounding.centroids))
    return multiples(plain.view(block.shape[0], block.shape[2]), scales, fmt)


def multiples(plain: Tensor, scales: Sequence[float], fmt: GroupedFormat) -> Tensor:
    """What ``tried_norms`` gives for such norms, float32 [B, N]."""
    return stored(torch.tensor(scales, device=plain.device)[:, None, None] * plain, fmt)


def stored(norms: Tensor, fmt: GroupedFormat) -> Tensor:
    """As the stored dtype holds them, float32; what is larger than its largest number becomes that."""
    dtype = codec.NORMS_TORCH[fmt.norms]
    return norms.clamp(max=torch.finfo(dtype).max).to(dtype).float()


def kept(codes: Tensor, norms: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the trial that left least, the first of equals.

    Args:
        codes: uint8 [size, tried, B, N].
        norms: float32 [tried, B, N].
        errors: float32 [size, tried, B, N].

    Returns:
        Codes [B, size, N], norms [B, N] and errors [B, size, N].
    """
    flat = errors.flatten(1)
    left = Products(len(flat), flat.shape[1], flat.device).dot(flat, flat).view(norms.shape)
    best = left.argmin(0, keepdim=True)
    each = best.expand(len(errors), *best.shape)
    of_codes, of_errors = (x.gather(1, each).squeeze(1).transpose(0, 1).contiguous() for x in (codes, errors))
    return of_codes, norms.gather(0, best).squeeze(0), of_errors
