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

import torch
from torch import Tensor

from kappaquant.errors import NonFiniteError
from kappaquant.formats import codec
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
_REFITTED = {"cpu": 1 << 24, "cuda": 1 << 28}  # floats that refitting holds at once


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
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # one by one: a GPU's factorizations of a batch are meant for small matrices
    for at, (matrix, order) in enumerate(zip(gram, columns.flip(1), strict=True)):
        lower, failed = torch.linalg.cholesky_ex(matrix[order][:, order])
        upper[at] = torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
        fine[at] = (failed == 0) & upper[at].isfinite().all()
    return upper, fine


def encode(weight: Tensor, fmt: GroupedFormat, inputs: Inputs, name: str = "weight") -> Rounded:
    """Quantize weights [B, N, in] of any float dtype for such inputs.

    Raises:
        NonFiniteError: a weight holds NaN or infinity, or values that the norms cannot.
    """
    plain = dispatch.encode(weight, fmt, "best", name=name)  # refuses what cannot be stored
    target = fmt.rotate(weight).mT.contiguous()
    aim = _Aim(target, fmt, inputs.gram)
    free = aim.state(*_unpacked(plain.parts[PACKED_SUFFIX], plain.parts[NORMS_SUFFIX], fmt))
    found = _feed_back(aim, inputs)
    found = _better(found, _refit(found, aim))
    if isinstance(
        fmt, CodebookFormat
    ):  # of trellis codes the search has found them: less than 0.5 % would be left to gain
        found = _better(found, _descend(found, aim))
        found = _better(found, _refit(found, aim))
    found = _better(found, free)
    norms = found.norms.mT.to(codec.NORMS_TORCH[fmt.norms]).contiguous()
    return Rounded(
        {PACKED_SUFFIX: codec.packed(found.codes.mT.contiguous(), fmt), NORMS_SUFFIX: norms},
        (target - _values(found.codes, found.norms, fmt)).square().sum(1), target.square().sum(1), found.lost,
    )  # fmt: skip


@dataclass(frozen=True)
class _State:
    """Codes uint8 [B, K, N], norms float32 [B, K / group_size, N] that the stored dtype holds, and the rows' errors under H [B, N]."""

    codes: Tensor
    norms: Tensor
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
        return _State(codes, norms, ((self.gram @ error) * error).sum(1))


def _unpacked(packed: Tensor, norms: Tensor, fmt: GroupedFormat) -> tuple[Tensor, Tensor]:
    return codec.indices(packed, fmt).mT.contiguous(), norms.float().mT.contiguous()


def _values(codes: Tensor, norms: Tensor, fmt: GroupedFormat) -> Tensor:
    """float32 [B, K, N], still rotated."""
    return codec.centroids(fmt, codes.device)[codes.int()] * norms.repeat_interleave(fmt.group_size, 1)


def _better(a: _State, b: _State) -> _State:
    """Of each row the state that loses less, the first where they are equal."""
    take = b.lost < a.lost
    codes, norms = (torch.where(take[:, None], y, x) for x, y in ((a.codes, b.codes), (a.norms, b.norms)))
    return _State(codes, norms, torch.where(take, b.lost, a.lost))


def _feed_back(aim: _Aim, inputs: Inputs) -> _State:
    """Codes and norms group by group; of each group's norms that are tried the one whose rounding leaves least to spread."""
    target, fmt = aim.target, aim.fmt
    size = fmt.group_size
    count, width, rows = target.shape
    grouped = target.view(count, -1, size, rows)
    rest = grouped.gather(1, inputs.order[..., None, None].expand_as(grouped)).view_as(target)
    codes = torch.empty(grouped.shape, dtype=torch.uint8, device=target.device)
    norms = torch.empty(count, width // size, rows, device=target.device)
    tries = _FEW_SCALES if isinstance(fmt, TrellisFormat) else _SCALES
    scales = torch.tensor(tries, device=target.device)[:, None, None]
    for start in range(0, width, size):
        stop = start + size
        block, upper = rest[:, start:stop], inputs.upper[:, start:stop]
        tried = _stored(scales * _plain_norms(block, fmt), fmt)
        if isinstance(fmt, TrellisFormat):
            found, errors = rings.feed(block, tried, upper[:, :, start:stop], fmt)
        else:
            assert isinstance(fmt, CodebookFormat)
            found, errors = groups.feed(block, tried, upper[:, :, start:stop], fmt)
        best = errors.square().sum(0).argmin(0, keepdim=True)
        each = best.expand(size, 1, count, rows)
        codes[:, start // size] = found.gather(1, each).squeeze(1).transpose(0, 1)
        norms[:, start // size] = tried.gather(0, best).squeeze(0)
        rest[:, stop:] -= upper[:, :, stop:].mT @ errors.gather(1, each).squeeze(1).transpose(0, 1)
    back = inputs.order.argsort(1)[..., None]
    codes = codes.gather(1, back[..., None].expand_as(codes))
    return aim.state(codes.view_as(target), norms.gather(1, back.expand_as(norms)))


def _plain_norms(block: Tensor, fmt: GroupedFormat) -> Tensor:
    """float32 [B, N]: the least-squares norm of each row of [B, size, N] at the scale that explains most of it, as effort best."""
    columns = block.transpose(0, 1).reshape(fmt.group_size, -1)
    rounding = fmt.rounding(columns.shape[1], block.device)
    norm = rounding.dot(columns, columns).sqrt()
    unit = columns / torch.where(norm == 0, 1.0, norm)
    rounding.choose(unit * rounding.best_scale(unit))
    dot = rounding.dot(unit, rounding.centroids).clone()
    return (norm * (dot / rounding.dot(rounding.centroids, rounding.centroids))).view(len(block), -1)


def _refit(state: _State, aim: _Aim) -> _State:
    """The norms that minimize a row's error under H for its codes, where all of them are positive."""
    target, fmt, gram = aim.target, aim.fmt, aim.gram
    (count, number, rows), size = state.norms.shape, fmt.group_size
    book = codec.centroids(fmt, target.device)
    norms = torch.empty_like(state.norms)
    across = gram.view(count, number, size, -1).mT
    step = max(1, _REFITTED[target.device.type] // (count * number * target.shape[1]))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        unit = book[state.codes[..., some].int()].view(count, number, size, -1)
        weighted = across @ unit  # [B, groups, K, n]
        system = (weighted.view(count, number, number, size, -1) * unit[:, None]).sum(3).permute(0, 3, 1, 2)
        wanted = (weighted * target[:, None, :, some]).sum(2).mT
        system.diagonal(dim1=2, dim2=3).mul_(1 + 1e-6)
        solved, _ = torch.linalg.solve_ex(system, wanted[..., None])
        norms[..., some] = _stored(solved.squeeze(-1).mT, fmt)
    usable = (norms.isfinite() & (norms > 0)).all(1, keepdim=True)
    return aim.state(state.codes, torch.where(usable, norms, state.norms))


def _descend(state: _State, aim: _Aim) -> _State:
    """Codes changed one input at a time to what is nearest to the best value of it, all others as they are."""
    target, fmt, gram = aim.target, aim.fmt, aim.gram
    assert isinstance(fmt, CodebookFormat)
    size = fmt.group_size
    book = codec.centroids(fmt, target.device)
    codes, values = state.codes.clone(), _values(state.codes, state.norms, fmt)
    inverses = 1 / gram.diagonal(dim1=1, dim2=2)
    left = gram @ (target - values)
    for _ in range(_SWEEPS):
        for start in range(0, target.shape[1], size):
            some = slice(start, start + size)
            norms = state.norms[:, start // size]
            found, changes = groups.descend(
                left[:, some], values[:, some], norms, gram[:, some, some], inverses[:, some], fmt
            )
            codes[:, some] = found.transpose(0, 1)
            values[:, some] = book[codes[:, some].int()] * norms[:, None]
            left -= gram[:, :, some] @ changes.transpose(0, 1)
    return aim.state(codes, state.norms)


def _stored(norms: Tensor, fmt: GroupedFormat) -> Tensor:
    """As the stored dtype holds them, float32; chosen before the codes, which then make up for the rounding."""
    return norms.to(codec.NORMS_TORCH[fmt.norms]).float()
