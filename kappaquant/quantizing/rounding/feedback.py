"""Rounding that knows its layer's inputs: codes one after another, each making up for what those before it left.

Where x are a layer's rotated inputs and H is the sum of x x^T, a weight's error counts as (w - q) H (w - q)^T. With U the upper
Cholesky factor of H^-1, taking the nearest code of an input and spreading its error over those to come by U's row is LDLQ (QuIP,
Chee et al., 2023) in GPTQ's form (Frantar et al., 2023). Then norms are refitted by least squares under H, and codes changed
one at a time wherever that lowers the error: coordinate descent, as in QuIP's greedy updates. A row never ends worse than without H.

Matrices of one shape are rounded together, B at a time, each for its own H. All arrays lie input by input, [B, K, N], for inputs are
gone through one after another, and the N rows of each at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kappaquant.errors import NonFiniteError
from kappaquant.formats import codec, trials
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.quantizing.rounding import groups, rings

logger = logging.getLogger("kappaquant")

# of the mean diagonal, added to it: what inputs that were not seen may do; 0.03 loses less where matrices are rounded alone, and no less in
# the whole model (SmolLM2, docs/calibration.md)
DAMPING = 0.01
_MOST_DAMPING = 1.0
_SCALES = (1.0, 0.88, 0.94, 1.06, 1.12)  # of a group's norm without H, tried by what is left of its error under H
_FEW_SCALES = (1.0, 0.94, 1.06)  # where each takes a search; one alone loses 3 %
_SWEEPS = 2  # of coordinate descent; a third gains less than 0.3 %
_SOLVED = 256  # inputs of a triangle that is inverted at once
_REFITTED = {"cpu": 1 << 20, "cuda": 1 << 28}  # centroids that refitting holds at once: on a CPU, in its cache


@dataclass(frozen=True)
class Inputs:
    """What is known of the rotated inputs of B matrices.

    Attributes:
        gram: float32 [B, K, K], H with its damping.
        order: int64 [B, groups], in which they are rounded: those of most energy first.
        upper: float32 [B, K, K], upper Cholesky factor of H^-1, in that order.
        damping: of each, what was added, as a share of the mean diagonal.
    """

    gram: Tensor
    order: Tensor
    upper: Tensor
    damping: list[float]


@dataclass(frozen=True)
class Rounded:
    """Weights [B, N, in] in their parts, and what each row lost.

    Attributes:
        parts: suffix -> tensor [B, N, ...], as the format describes them.
        squared_errors, energies: float32 [B, N], of (w - q)^2 and w^2.
        weighted_errors: float32 [B, N], (w - q) H (w - q)^T with the damped H.
    """

    parts: dict[str, Tensor]
    squared_errors: Tensor
    energies: Tensor
    weighted_errors: Tensor


def rotated(gram: Tensor, fmt: GroupedFormat) -> Tensor:
    """The sums of rotate(x) rotate(x)^T, [..., K, K] with K padded to whole groups, from those of x x^T, [..., in, in]."""
    return fmt.rotate(fmt.rotate(gram).mT.contiguous())


def prepare(gram: Tensor, group_size: int, names: Sequence[str], damping: float = DAMPING) -> Inputs:
    """Damping, order and Cholesky factors of sums of outer products [B, K, K] of rotated inputs.

    Damping is raised tenfold until a matrix is positive definite, and the log says so.

    Args:
        names: what messages call each.

    Raises:
        NonFiniteError: sums are not finite, or vanish.
    """
    gram = (gram + gram.mT) / 2
    diagonal = gram.diagonal(dim1=1, dim2=2)
    means, finite = diagonal.double().mean(1).tolist(), gram.isfinite().flatten(1).all(1).tolist()
    for name, mean, whole in zip(names, means, finite, strict=True):
        if not whole or not mean > 0:
            raise NonFiniteError(
                f"{name}: the calibration text gives its inputs a mean square of {mean:g}; calibrate with text that the model can "
                "read, or quantize without --calibration"
            )
    order = diagonal.reshape(len(gram), -1, group_size).mean(2).argsort(dim=1, descending=True, stable=True)
    inside = torch.arange(group_size, device=gram.device)
    columns = (order[..., None] * group_size + inside).flatten(1)
    shares = [damping] * len(gram)
    damped = gram.double()
    damped.diagonal(dim1=1, dim2=2).add_(damping * diagonal.double().mean(1, keepdim=True))
    upper, fine = _inverse_factor(damped, columns)
    for at in (~fine).nonzero().flatten().tolist():
        while not fine[at]:
            if shares[at] >= _MOST_DAMPING:
                raise NonFiniteError(
                    f"{names[at]}: its inputs' second moments stay singular with a damping of {shares[at]:g}; calibrate with "
                    "more text"
                )
            damped[at].diagonal().add_(9 * shares[at] * means[at])
            shares[at] *= 10
            logger.warning(
                "%s: second moments of its inputs are not positive definite; damping raised to %g",
                names[at],
                shares[at],
            )
            one = slice(at, at + 1)
            upper[one], fine[one] = _inverse_factor(damped[one], columns[one])
    return Inputs(damped.float(), order, upper, shares)


def _inverse_factor(gram: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(upper Cholesky factors of inverses [B, K, K] in another order, float32, and which could be made).

    With the order turned round, H = L L^T; turned back, L^-1 is upper triangular, and H^-1 = (L^-1)^T L^-1.
    """
    upper = torch.empty(gram.shape, device=gram.device)
    fine = torch.empty(len(gram), dtype=torch.bool, device=gram.device)
    # one by one: a GPU's factorizations of a batch are meant for small matrices
    for at, (matrix, order) in enumerate(zip(gram, columns.flip(1), strict=True)):
        lower, failed = torch.linalg.cholesky_ex(matrix[order[:, None], order])
        upper[at] = _inverse(lower).flip(0, 1)
        fine[at] = (failed == 0) & upper[at].isfinite().all()
    return upper, fine


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle [K, K], by halves: its zeros are not multiplied, which takes less than half of a solution's time."""
    if len(lower) <= _SOLVED:
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    half = len(lower) // 2
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return inverse


def encode(weight: Tensor, fmt: GroupedFormat, inputs: Inputs, name: str = "weight") -> Rounded:
    """Quantize weights [B, N, in] of any float dtype for such inputs.

    Raises:
        NonFiniteError: a weight holds NaN or infinity, or values that the norms cannot.
    """
    plain = dispatch.encode(weight, fmt, "best", name=name)  # refuses what cannot be stored
    target = fmt.rotate(weight).mT.contiguous()
    aim = _Aim(target, fmt, inputs.gram)
    found = _feed_back(aim, inputs)
    found = _better(found, _refit(found, aim))
    if isinstance(
        fmt, CodebookFormat
    ):  # of trellis codes the search has found them: less than 0.5 % would be left to gain
        found = _better(found, _descend(found, aim))
        found = _better(found, _refit(found, aim))
    found = _better(found, aim.state(*_unpacked(plain.parts[PACKED_SUFFIX], plain.parts[NORMS_SUFFIX], fmt)))
    norms = found.norms.mT.to(codec.NORMS_TORCH[fmt.norms]).contiguous()
    return Rounded(
        {PACKED_SUFFIX: codec.packed(found.codes.mT.contiguous(), fmt), NORMS_SUFFIX: norms},
        (target - _values(found.codes, found.norms, fmt)).square().sum(1), target.square().sum(1), found.lost,
    )  # fmt: skip


@dataclass(frozen=True)
class _State:
    """One choice, and what it loses.

    Attributes:
        codes: uint8 [B, K, N].
        norms: float32 [B, K / group_size, N], of values that the stored dtype holds.
        left: float32 [B, K, N], H times the error.
        lost: float32 [B, N], the rows' errors under H.
    """

    codes: Tensor
    norms: Tensor
    left: Tensor
    lost: Tensor


@dataclass(frozen=True)
class _Aim:
    """What codes and norms are to come close to: rotated weights float32 [B, K, N] under H [B, K, K]."""

    target: Tensor
    fmt: GroupedFormat
    gram: Tensor

    def state(self, codes: Tensor, norms: Tensor) -> _State:
        """These, with what they lose."""
        error = self.target - _values(codes, norms, self.fmt)
        left = self.gram @ error
        return _State(codes, norms, left, (left * error).sum(1))

    @cached_property
    def weighted(self) -> Tensor:
        """float32 [B, K, N], H times what is aimed at."""
        return self.gram @ self.target


def _unpacked(packed: Tensor, norms: Tensor, fmt: GroupedFormat) -> tuple[Tensor, Tensor]:
    return codec.indices(packed, fmt).mT.contiguous(), norms.float().mT.contiguous()


def _values(codes: Tensor, norms: Tensor, fmt: GroupedFormat) -> Tensor:
    """float32 [B, K, N], still rotated."""
    return _unit(codes, fmt) * norms.repeat_interleave(fmt.group_size, 1)


def _unit(codes: Tensor, fmt: GroupedFormat) -> Tensor:
    """Centroids, float32 of the codes' shape."""
    book = codec.centroids(fmt, codes.device)
    return book.index_select(0, codes.flatten().int()).view(codes.shape)  # a fifth of the time that indexing takes


def _better(a: _State, b: _State) -> _State:
    """Of each row the state that loses less, the first where they are equal."""
    take = b.lost < a.lost
    pairs = ((a.codes, b.codes), (a.norms, b.norms), (a.left, b.left))
    codes, norms, left = (torch.where(take[:, None], y, x) for x, y in pairs)
    return _State(codes, norms, left, torch.where(take, b.lost, a.lost))


def _feed_back(aim: _Aim, inputs: Inputs) -> _State:
    """Codes and norms group by group; of each group's norms that are tried the one whose rounding leaves least to spread."""
    target, fmt = aim.target, aim.fmt
    size = fmt.group_size
    count, width, rows = target.shape
    grouped = target.view(count, -1, size, rows)
    rest = grouped.gather(1, inputs.order[..., None, None].expand_as(grouped)).view_as(target)
    codes = torch.empty(grouped.shape, dtype=torch.uint8, device=target.device)
    norms = torch.empty(count, width // size, rows, device=target.device)
    for start in range(0, width, size):
        stop = start + size
        upper, at = inputs.upper[:, start:stop], start // size
        codes[:, at], norms[:, at], errors = _choose(rest[:, start:stop], upper[:, :, start:stop], fmt)
        rest[:, stop:] -= upper[:, :, stop:].mT @ errors
    back = inputs.order.argsort(1)[..., None]
    codes = codes.gather(1, back[..., None].expand_as(codes))
    return aim.state(codes.view_as(target), norms.gather(1, back.expand_as(norms)))


def _choose(block: Tensor, upper: Tensor, fmt: GroupedFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, norms and errors of one group, see ``groups.choose``."""
    if isinstance(fmt, TrellisFormat):
        return rings.choose(block, upper, _FEW_SCALES, fmt)
    assert isinstance(fmt, CodebookFormat)
    return groups.choose(block, upper, _SCALES, fmt)


def _refit(state: _State, aim: _Aim) -> _State:
    """The norms that minimize a row's error under H for its codes, where all of them are positive."""
    target, fmt, gram = aim.target, aim.fmt, aim.gram
    (count, number, rows), size = state.norms.shape, fmt.group_size
    norms = torch.empty_like(state.norms)
    step = max(1, _REFITTED[target.device.type] // (count * target.shape[1]))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        unit = _unit(state.codes[..., some], fmt)
        system = unit.new_empty(count, unit.shape[2], number, number)
        for at in range(number):  # of all pairs of groups, each once
            inputs = slice(at * size, (at + 1) * size)
            weighted = gram[:, inputs.start :, inputs] @ unit[:, inputs]
            pairs = _by_group(weighted * unit[:, inputs.start :], size).mT
            system[:, :, at, at:] = system[:, :, at:, at] = pairs
        wanted = _by_group(aim.weighted[..., some] * unit, size).mT
        system.diagonal(dim1=2, dim2=3).mul_(1 + 1e-6)
        solved, _ = torch.linalg.solve_ex(system, wanted[..., None])
        norms[..., some] = trials.stored(solved.squeeze(-1).mT, fmt)
    usable = (norms > 0).all(1, keepdim=True)
    return aim.state(state.codes, torch.where(usable, norms, state.norms))


def _by_group(x: Tensor, size: int) -> Tensor:
    """Sums over each group's inputs: [B, K, N] -> [B, K / size, N]."""
    return x.view(len(x), -1, size, x.shape[2]).sum(2)


def _descend(state: _State, aim: _Aim) -> _State:
    """Codes changed one input at a time to what is nearest to the best value of it, all others as they are."""
    target, fmt, gram = aim.target, aim.fmt, aim.gram
    assert isinstance(fmt, CodebookFormat)
    size = fmt.group_size
    codes, values, left = state.codes.clone(), _values(state.codes, state.norms, fmt), state.left.clone()
    inverses = 1 / gram.diagonal(dim1=1, dim2=2)
    for _ in range(_SWEEPS):
        for start in range(0, target.shape[1], size):
            some = slice(start, start + size)
            norms = state.norms[:, start // size]
            codes[:, some], values[:, some], changes = groups.descend(
                left[:, some], values[:, some], norms, gram[:, some, some], inverses[:, some], fmt
            )
            left -= gram[:, :, some] @ changes
    return _State(codes, state.norms, left, (left * (target - values)).sum(1))
