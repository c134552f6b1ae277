"""Trellis codes with error feedback: a ring by itself in float64, every path of a small one, and the search without feedback."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kappaquant.formats import viterbi
from kappaquant.formats.trellis import Trellis, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.quantizing.rounding import rings


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(count: int, size: int, seed: int, energy: float = -0.7) -> Tensor:
    """Upper factors [B, size, size] of the inverse of H, of inputs of few directions that count."""
    x = draw(count, 4 * size, size, seed=seed) * torch.arange(1, size + 1).float() ** energy
    mixed = x @ torch.linalg.qr(draw(count, size, size, seed=seed + 1)).Q
    gram = mixed.mT @ mixed / (4 * size)
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


@pytest.mark.parametrize("fmt", [TrellisFormat(2, 32), TrellisFormat(3, 64), TrellisFormat(4, 32)], ids=lambda f: f.id)
def test_errors_are_spread_over_what_comes(fmt: TrellisFormat) -> None:
    size, levels = fmt.group_size, torch.tensor(fmt.codebook).double()
    block, norms = draw(2, size, 3, seed=0), draw(2, 2, 3, seed=1).abs() * size**0.5
    norms[1, 1, 0] = 0
    upper = factor(2, size, 2)
    codes, errors = rings.feed(block, norms, upper, fmt)
    flat = codes.flatten(1)
    assert torch.equal(fmt.unpack_block(fmt.pack_block(flat)), flat)  # all lie on rings
    for tried, matrix, row in itertools.product(range(2), range(2), range(3)):
        rest, norm = block[matrix, :, row].double(), float(norms[tried, matrix, row])
        for j in range(size):
            error = (rest[j] - levels[int(codes[j, tried, matrix, row])] * norm) / upper[matrix, j, j].double()
            assert float(errors[j, tried, matrix, row]) == pytest.approx(float(error), rel=1e-2, abs=1e-2)
            rest[j + 1 :] -= upper[matrix, j, j + 1 :].double() * error


def test_matrices_beside_each_other_get_what_each_gets_alone() -> None:
    block, upper, fmt = draw(3, 32, 5, seed=0), factor(3, 32, 1), TrellisFormat(3, 32)
    together = rings.choose(block, upper, (0.9, 1.0), fmt)
    for at in range(3):
        alone = rings.choose(block[at : at + 1], upper[at : at + 1], (0.9, 1.0), fmt)
        assert (together[0][at] == alone[0][0]).float().mean() > 0.95  # sums of more at once may end a digit off
        torch.testing.assert_close(together[2][at].square().sum(), alone[2].square().sum(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("fmt", [TrellisFormat(2, 32), TrellisFormat(3, 128)], ids=lambda f: f.id)
def test_without_feedback_it_is_the_search_of_the_format(fmt: TrellisFormat) -> None:
    block = draw(1, fmt.group_size, 40, seed=0)
    norms = block.square().sum(1).sqrt()[None]
    codes, errors = rings.feed(block, norms, torch.eye(fmt.group_size)[None], fmt)
    levels = torch.tensor(fmt.codebook)
    expected = viterbi.closest(block[0] / norms[0], levels)
    assert (codes[:, 0, 0] == expected).float().mean() > 0.98  # roundings differ
    lost = (block[0] - levels[expected.int()] * norms[0, 0]).square().sum()
    assert float(errors.square().sum()) == pytest.approx(float(lost), rel=5e-3)


def test_it_is_near_the_best_of_every_path_and_below_codes_without_feedback() -> None:
    """Each path of a small ring with the nearest level of what it leaves, one weight after another."""
    code, size, count = Trellis((1,), (0, 2)), 12, 30
    levels = torch.tensor(TrellisFormat(2, 32).codebook) * math.sqrt(32)
    block, upper = draw(1, size, count, seed=5), factor(1, size, 6, energy=-0.2)
    paths = torch.tensor(list(itertools.product((0, 1), repeat=size)), dtype=torch.uint8).t()
    subset = viterbi.subsets(paths, code).long()
    rest = block[0, :, None].repeat(1, paths.shape[1], 1)
    costs = torch.zeros(paths.shape[1], count)
    for j in range(size):
        mine = levels.view(-1, 4)[:, subset[j]]  # [2, paths]
        nearest = torch.where(rest[j] > mine.mean(0)[:, None], mine[1, :, None], mine[0, :, None])
        error = (rest[j] - nearest) / upper[0, j, j]
        costs += error.square()
        rest[j + 1 :] -= upper[0, j, j + 1 :, None, None] * error
    least = costs.amin(0)
    found = rings.closed(block, torch.ones(1, count), upper, levels, code)[0]
    mine, plain = (
        torch.linalg.solve_triangular(upper[0].mT, block[0] - levels[c.int()], upper=False).square().sum(0)
        for c in (found, viterbi.closest(block[0], levels, code))
    )
    assert bool((mine >= least * (1 - 1e-4)).all())
    assert mine.sum() < 1.15 * least.sum()  # a ring of 12 hardly forgets before it closes
    assert mine.sum() < 0.95 * plain.sum()


def test_what_is_searched_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, block, upper = TrellisFormat(3, 32), draw(2, 32, 9, seed=0), factor(2, 32, 1)
    norms = block.square().sum(1).sqrt()[None] * torch.tensor([1.0, 0.9])[:, None, None]
    codes, errors = rings.feed(block, norms, upper, fmt)
    monkeypatch.setitem(rings._FLOATS, "cpu", 1)
    again, others = rings.feed(block, norms, upper, fmt)
    assert (codes == again).float().mean() > 0.98  # products of other shapes round otherwise
    assert float(others.square().sum()) == pytest.approx(float(errors.square().sum()), rel=0.02)


def test_matrices_are_rounded_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
    fmt, block, upper = TrellisFormat(3, 32), draw(2, 32, 5, seed=0), factor(2, 32, 1)
    together = rings.choose(block, upper, (1.0, 0.94), fmt)
    for at in range(2):
        alone = rings.choose(block[at : at + 1], upper[at : at + 1], (1.0, 0.94), fmt)
        assert [part.shape[1:] for part in alone] == [part.shape[1:] for part in together]
        assert (together[0][at] == alone[0][0]).float().mean() > 0.98  # products of other shapes round otherwise
        assert float(together[2][at].square().sum()) == pytest.approx(float(alone[2].square().sum()), rel=0.02)
