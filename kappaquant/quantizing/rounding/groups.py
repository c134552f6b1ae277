"""The codes of one group of inputs, one input after another, each making up for what those before it left.

All arrays lie input by input, for the rows of each are rounded at once. NVIDIA GPUs have a kernel for it, and CPUs the native core, which
gives these very bytes: products, sums and quotients are rounded by themselves, and what is added up is added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kappaquant.formats import codec, trials
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.search import Assignment, nearest
from kappaquant.kernels import dispatch


def choose(block: Tensor, upper: Tensor, scales: Sequence[float], fmt: CodebookFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and norms; of each row the norm, of those tried, whose rounding leaves least to spread over inputs of other groups.

    Args:
        block: float32 [B, size, N].
        upper: float32 [B, size, size], the group's part of the upper factor of H^-1.
        scales: what is tried, of a row's norm without H.

    Returns:
        Codes uint8 [B, size, N], norms float32 [B, N], and errors over the factor's diagonal float32 [B, size, N].
    """
    if kernel := dispatch.feedback(block):
        codes, norms, errors = kernel.choose(block, upper, scales, fmt)
        return codes, norms, errors
    norms = trials.tried_norms(block, scales, fmt)
    codes, errors = feed(block, norms, upper, fmt)
    return trials.kept(codes, norms, errors)


def feed(block: Tensor, norms: Tensor, upper: Tensor, fmt: CodebookFormat) -> tuple[Tensor, Tensor]:
    """Nearest codes, the error of each spread over the inputs to come.

    Args:
        block, upper: as for ``choose``.
        norms: float32 [tried, B, N], each tried by itself.

    Returns:
        Codes uint8 and errors over the factor's diagonal float32, both [size, tried, B, N].
    """
    rest = block.transpose(0, 1)[:, None].expand(-1, len(norms), -1, -1).contiguous()
    codes, errors = torch.empty_like(rest, dtype=torch.uint8), torch.empty_like(rest)
    inverse = _inverse(norms)
    book = _Book(fmt, norms.shape, block.device)
    for j in range(block.shape[1]):
        code, centroid = book(rest[j] * inverse)
        codes[j] = code
        errors[j] = (rest[j] - centroid * norms) / upper[:, j, j, None]
        rest[j + 1 :] -= upper[:, j, j + 1 :].t()[:, None, :, None] * errors[j]
    return codes, errors


def descend(
    left: Tensor, values: Tensor, norms: Tensor, gram: Tensor, inverses: Tensor, fmt: CodebookFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """The code of each input that is nearest to the best value of it, all others as they are.

    Args:
        left: float32 [B, size, N], of H times the error.
        values: float32 [B, size, N], of before.
        norms: float32 [B, N].
        gram: float32 [B, size, size], the group's part of H.
        inverses: float32 [B, size], of its diagonal.

    Returns:
        Codes uint8, their values float32 and how these changed, all [B, size, N].
    """
    if kernel := dispatch.feedback(left):
        codes, found, changes = kernel.descend(left, values, norms, gram, inverses, fmt)
        return codes, found, changes
    mine, now = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in (left, values))
    codes, found, changes = (torch.empty_like(mine, dtype=dtype) for dtype in (torch.uint8, None, None))
    inverse = _inverse(norms)
    book = _Book(fmt, norms.shape, left.device)
    for j in range(left.shape[1]):
        code, centroid = book((now[j] + mine[j] * inverses[:, j, None]) * inverse)
        codes[j] = code
        found[j] = centroid * norms
        changes[j] = found[j] - now[j]
        mine[j + 1 :] -= gram[:, j, j + 1 :].t()[..., None] * changes[j]
    return codes.transpose(0, 1), found.transpose(0, 1), changes.transpose(0, 1)


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms == 0, 0.0, 1 / norms)


class _Book:
    """Nearest centroids of values of one shape: by table on a CPU, where a binary search takes twice as long; a GPU counts launches."""

    def __init__(self, fmt: CodebookFormat, shape: Sequence[int], device: torch.device) -> None:
        self._shape = shape
        self._centroids = codec.centroids(fmt, device)
        self._thresholds = (self._centroids[1:] + self._centroids[:-1]) / 2
        self._table = nearest(fmt.codebook, device)
        self._assignment = Assignment(1, torch.Size(shape).numel(), device) if device.type == "cpu" else None

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, centroids), good until the next call."""
        if self._assignment is None:
            code = torch.bucketize(y, self._thresholds, out_int32=True)
            return code, self._centroids[code]
        self._assignment.assign(y.view(1, -1), self._table)
        return self._assignment.codes.view(self._shape), self._assignment.centroids.view(self._shape)
