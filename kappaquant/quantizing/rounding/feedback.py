"""Rounding that knows its layer's inputs: codes one after another, each making up for what those before it left.

Where x are a layer's rotated inputs and H is the sum of x x^T, a weight's error counts as (w - q) H (w - q)^T. With U the upper
Cholesky factor of H^-1, taking the nearest code of an input and spreading its error over those to come by U's row is LDLQ (QuIP,
Chee et al., 2023) in GPTQ's form (Frantar et al., 2023). Then norms are refitted by least squares under H, and codes changed
one at a time wherever that lowers the error: coordinate descent, as in QuIP's greedy updates. A row never ends worse than without H.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from kappaquant.errors import NonFiniteError
from kappaquant.formats import codec
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat
from kappaquant.formats.search import Assignment, nearest

logger = logging.getLogger("kappaquant")

DAMPING = 0.01  # of the mean diagonal, added to it: what inputs that were not seen may do
_MOST_DAMPING = 1.0
_SCALES = (1.0, 0.88, 0.94, 1.06, 1.12)  # of a group's norm without H, tried by what is left of its error under H
_SWEEPS = 2  # of coordinate descent; a third gains less than 0.3 %


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's rotated inputs.

    Attributes:
        gram: float32 [K, K], H with its damping.
        order: int64 [K], inputs in the order in which they are rounded: groups of most energy first.
        upper: float32 [K, K], upper Cholesky factor of H^-1, in that order.
        damping: what was added, as a share of the mean diagonal.
    """

    gram: Tensor
    order: Tensor
    upper: Tensor
    damping: float


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] in its parts, and what each row lost.

    Attributes:
        parts: suffix -> tensor, as the format describes them.
        squared_errors, energies: float32 [N], of (w - q)^2 and w^2.
        weighted_errors: float32 [N], (w - q) H (w - q)^T with the damped H.
    """

    parts: dict[str, Tensor]
    squared_errors: Tensor
    energies: Tensor
    weighted_errors: Tensor


def rotated(gram: Tensor, fmt: CodebookFormat) -> Tensor:
    """The sum of rotate(x) rotate(x)^T, [K, K] with K padded to whole groups, from that of x x^T, [in, in]."""
    return fmt.rotate(fmt.rotate(gram).t().contiguous())


def prepare(gram: Tensor, group_size: int, name: str = "weight", damping: float = DAMPING) -> Inputs:
    """Damping, order and Cholesky factor of a sum of outer products [K, K] of rotated inputs.

    Damping is raised tenfold until the matrix is positive definite, and the log says so.

    Raises:
        NonFiniteError: the sums are not finite, or vanish.
    """
    gram = (gram + gram.t()) / 2
    mean = gram.diagonal().double().mean().item()
    if not bool(gram.isfinite().all()) or not mean > 0:
        raise NonFiniteError(
            f"{name}: the calibration text gives its inputs a mean square of {mean:g}; calibrate with text that the model can read, "
            "or quantize without --calibration"
        )
    energy = gram.diagonal().view(-1, group_size).mean(1)
    order = (
        energy.argsort(descending=True, stable=True)[:, None] * group_size
        + torch.arange(group_size, device=gram.device)
    ).flatten()
    while True:
        damped = gram.double()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(upper.isfinite().all()):
            return Inputs(damped.float(), order, upper.float(), damping)
        if damping >= _MOST_DAMPING:
            raise NonFiniteError(
                f"{name}: its inputs' second moments stay singular with a damping of {damping:g}; calibrate with more text"
            )
        damping *= 10
        logger.warning(
            "%s: second moments of its inputs are not positive definite; damping raised to %g", name, damping
        )


def encode(weight: Tensor, fmt: CodebookFormat, inputs: Inputs, name: str = "weight") -> Rounded:
    """Quantize a weight [N, in] of any float dtype for such inputs.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or values that the norms cannot.
    """
    plain = codec.encode(weight, fmt, "best", name=name)  # refuses what cannot be stored
    target = fmt.rotate(weight)
    free = _State.of(plain.parts[PACKED_SUFFIX], plain.parts[NORMS_SUFFIX], fmt)
    found = _feed_back(target, fmt, inputs)
    found = _refit(found, target, fmt, inputs.gram)
    found = _descend(found, target, fmt, inputs.gram)
    found = _refit(found, target, fmt, inputs.gram)
    found = _better(found, free, target, fmt, inputs.gram)
    error = target - found.values(fmt)
    return Rounded(
        {PACKED_SUFFIX: codec.pack(found.codes, fmt.bits), NORMS_SUFFIX: found.norms.to(codec.NORMS_TORCH[fmt.norms])},
        error.square().sum(1), target.square().sum(1), _weighted(error, inputs.gram),
    )  # fmt: skip


@dataclass(frozen=True)
class _State:
    """Codes uint8 [N, K], and norms float32 [N, K / group_size] that the stored dtype holds."""

    codes: Tensor
    norms: Tensor

    @classmethod
    def of(cls, packed: Tensor, norms: Tensor, fmt: CodebookFormat) -> _State:
        return cls(codec.unpack(packed, fmt.bits), norms.float())

    def values(self, fmt: CodebookFormat) -> Tensor:
        """float32 [N, K], still rotated."""
        book = codec.centroids(fmt, self.codes.device)
        return (book[self.codes.int()].view(*self.norms.shape, -1) * self.norms[..., None]).flatten(1)


def _weighted(error: Tensor, gram: Tensor) -> Tensor:
    return ((error @ gram) * error).sum(1)


def _better(a: _State, b: _State, target: Tensor, fmt: CodebookFormat, gram: Tensor) -> _State:
    """Of each row the state whose error under H is lower, the first where they are equal."""
    first, second = (_weighted(target - state.values(fmt), gram) for state in (a, b))
    take = (second < first)[:, None]
    return _State(torch.where(take, b.codes, a.codes), torch.where(take, b.norms, a.norms))


def _feed_back(target: Tensor, fmt: CodebookFormat, inputs: Inputs) -> _State:
    """Codes and norms group by group; of each group's norms that are tried the one whose rounding leaves least to spread."""
    size, width = fmt.group_size, target.shape[1]
    rest = target[:, inputs.order]
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    norms = torch.empty(len(target), width // size, device=target.device)
    scales = torch.tensor(_SCALES, device=target.device)[:, None]
    every = torch.arange(len(target), device=target.device)
    for start in range(0, width, size):
        stop = start + size
        block, upper = rest[:, start:stop], inputs.upper[start:stop]
        tried = _stored(scales * _plain_norms(block, fmt), fmt)
        found, errors = _round_group(block, tried, upper[:, start:stop], fmt)
        best = errors.square().sum(-1).argmin(0)
        codes[:, inputs.order[start:stop]] = found[best, every]
        norms[:, inputs.order[start] // size] = tried[best, every]
        rest[:, stop:] -= errors[best, every] @ upper[:, stop:]
    return _State(codes, norms)


def _round_group(block: Tensor, norms: Tensor, upper: Tensor, fmt: CodebookFormat) -> tuple[Tensor, Tensor]:
    """(codes, errors over U's diagonal), both [tried, N, size], for a block [N, size] at norms [tried, N]."""
    book, thresholds = _tables(fmt, block.device)
    rest = block.expand(len(norms), *block.shape).clone()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=block.device)
    errors = torch.empty_like(rest)
    inverse = torch.where(norms == 0, 0.0, 1 / norms)
    for j in range(block.shape[1]):
        code = torch.bucketize(rest[..., j] * inverse, thresholds)
        codes[..., j] = code
        errors[..., j] = (rest[..., j] - book[code] * norms) / upper[j, j]
        rest[..., j + 1 :] -= errors[..., j, None] * upper[j, j + 1 :]
    return codes, errors


def _plain_norms(block: Tensor, fmt: CodebookFormat) -> Tensor:
    """float32 [N]: the least-squares norm of each row [size] at the scale that explains most of it, as effort best has it."""
    columns = block.t().contiguous()
    table = nearest(fmt.codebook, block.device)
    assignment = Assignment(fmt.group_size, columns.shape[1], block.device)
    norm = assignment.dot(columns, columns).sqrt()
    unit = columns / torch.where(norm == 0, 1.0, norm)
    assignment.assign(unit * assignment.search_scale(unit, table), table)
    dot = assignment.dot(unit, assignment.centroids).clone()
    return norm * (dot / assignment.dot(assignment.centroids, assignment.centroids))


def _refit(state: _State, target: Tensor, fmt: CodebookFormat, gram: Tensor) -> _State:
    """The norms that minimize a row's error under H for its codes, where they are positive and do lower it."""
    groups, size = state.norms.shape[1], fmt.group_size
    book = codec.centroids(fmt, target.device)
    norms = torch.empty_like(state.norms)
    rows = max(1, (1 << 24) // (groups * target.shape[1]))
    for start in range(0, len(target), rows):
        some = slice(start, start + rows)
        unit = book[state.codes[some].int()].view(-1, groups, size)
        weighted = torch.einsum("ngi,gik->ngk", unit, gram.view(groups, size, -1))
        system = torch.einsum("nghi,nhi->ngh", weighted.view(len(unit), groups, groups, size), unit)
        wanted = torch.einsum("ngk,nk->ng", weighted, target[some])
        system.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6)
        solved, _ = torch.linalg.solve_ex(system, wanted)
        norms[some] = _stored(solved, fmt)
    usable = (norms.isfinite() & (norms > 0)).all(1, keepdim=True)
    return _better(state, _State(state.codes, torch.where(usable, norms, state.norms)), target, fmt, gram)


def _descend(state: _State, target: Tensor, fmt: CodebookFormat, gram: Tensor) -> _State:
    """Codes changed one input at a time to what is nearest to the best value of it, all others as they are."""
    size = fmt.group_size
    book, thresholds = _tables(fmt, target.device)
    codes, values = state.codes.clone(), state.values(fmt)
    diagonal = gram.diagonal()
    left = (target - values) @ gram
    for _ in range(_SWEEPS):
        for start in range(0, target.shape[1], size):
            stop = start + size
            norm = state.norms[:, start // size]
            inverse = torch.where(norm == 0, 0.0, 1 / norm)
            mine, inner = left[:, start:stop].clone(), gram[start:stop, start:stop]
            changes = torch.empty_like(mine)
            for j in range(size):
                at = start + j
                code = torch.bucketize((values[:, at] + mine[:, j] / diagonal[at]) * inverse, thresholds)
                value = book[code] * norm
                changes[:, j] = value - values[:, at]
                mine -= changes[:, j, None] * inner[j]
                codes[:, at], values[:, at] = code, value
            left -= changes @ gram[start:stop]
    return _better(state, _State(codes, state.norms), target, fmt, gram)


def _stored(norms: Tensor, fmt: CodebookFormat) -> Tensor:
    """As the stored dtype holds them, float32; chosen before the codes, which then make up for the rounding."""
    return norms.to(codec.NORMS_TORCH[fmt.norms]).float()


def _tables(fmt: CodebookFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centroids, and the values between neighbours at which the nearest one changes."""
    book = codec.centroids(fmt, device)
    return book, (book[1:] + book[:-1]) / 2
