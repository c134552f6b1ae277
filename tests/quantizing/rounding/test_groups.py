"""One group against the textbook: a row by itself, an input at a time, in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from kappaquant.formats import trials
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.kernels import dispatch
from kappaquant.quantizing.rounding import groups


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(book: Tensor, value: float, norm: float) -> int:
    return int((book * norm - value).abs().argmin()) if norm else int((book < 0).sum()) - 1  # a tie takes the lower


@pytest.mark.parametrize(
    "fmt", [CodebookFormat(2, 32), CodebookFormat(3, 64), CodebookFormat(5, 32)], ids=lambda f: f.id
)
def test_errors_are_spread_over_what_comes(fmt: CodebookFormat) -> None:
    size, book = fmt.group_size, torch.tensor(fmt.codebook).double()
    block, norms = draw(2, size, 3, seed=0), draw(4, 2, 3, seed=1).abs() * size**0.5
    norms[2, 1, 0] = 0
    upper = torch.linalg.qr(draw(2, size, size, seed=2)).R.abs()
    codes, errors = groups.feed(block, norms, upper, fmt)
    for tried, matrix, row in torch.cartesian_prod(*map(torch.arange, norms.shape)).tolist():
        rest, norm, factor = block[matrix, :, row].double(), float(norms[tried, matrix, row]), upper[matrix].double()
        for j in range(size):
            code = nearest(book, float(rest[j]), norm)
            error = (rest[j] - book[code] * norm) / factor[j, j]
            assert int(codes[j, tried, matrix, row]) == code
            assert float(errors[j, tried, matrix, row]) == pytest.approx(float(error), rel=1e-3, abs=1e-3)
            error = errors[j, tried, matrix, row].double()  # so that roundings do not grow
            rest[j + 1 :] -= factor[j, j + 1 :] * error


@pytest.mark.parametrize("kernels", [(), dispatch._FEEDBACKS], ids=["torch", "kernels"])
def test_the_norm_that_leaves_least_is_kept(kernels: tuple[ModuleType, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its codes and errors, row by row."""
    fmt, scales = CodebookFormat(3, 32), (1.0, 0.5, 0.9, 1.1)
    block, upper = draw(2, 32, 40, seed=0), torch.linalg.qr(draw(2, 32, 32, seed=2)).R.abs()
    monkeypatch.setattr(dispatch, "_FEEDBACKS", kernels)
    codes, norms, errors = groups.choose(block, upper, scales, fmt)
    each = [groups.choose(block, upper, (scale,), fmt) for scale in scales]
    left = torch.stack([one[2].double().square().sum(1) for one in each])
    assert set(left.argmin(0).unique().tolist()) >= {0, 2}
    for matrix, row in torch.cartesian_prod(torch.arange(2), torch.arange(40)).tolist():
        best = each[int(left[:, matrix, row].argmin())]
        assert torch.equal(codes[matrix, :, row], best[0][matrix, :, row])
        assert norms[matrix, row] == best[1][matrix, row]
        assert torch.equal(errors[matrix, :, row], best[2][matrix, :, row])
    fed = groups.feed(block, trials.tried_norms(block, scales[:1], fmt), upper, fmt)
    torch.testing.assert_close(each[0][2], fed[1][:, 0].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("kernels", [(), dispatch._FEEDBACKS], ids=["torch", "kernels"])
def test_a_code_is_the_best_while_all_others_stay(
    kernels: tuple[ModuleType, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By trying every code of an input, and taking the one whose row's error under H is least."""
    fmt = CodebookFormat(3, 32)
    size, book = 32, torch.tensor(fmt.codebook)
    x = draw(2, 200, size, seed=0)
    gram = x.mT @ x
    target, norms = draw(2, size, 3, seed=1), draw(2, 3, seed=2).abs() * size**0.5
    values = book[torch.randint(8, (2, size, 3), generator=torch.Generator().manual_seed(3))] * norms[:, None]
    left, inverses = gram @ (target - values), 1 / gram.diagonal(dim1=1, dim2=2)
    monkeypatch.setattr(dispatch, "_FEEDBACKS", kernels)
    codes, found, changes = groups.descend(left, values, norms, gram, inverses, fmt)
    torch.testing.assert_close(found, values + changes)
    for matrix in range(2):
        for row in range(3):
            now = values[matrix, :, row].double()
            for j in range(size):
                tries = now.expand(8, size).clone()
                tries[:, j] = book * norms[matrix, row]
                error = target[matrix, :, row] - tries
                best = int(((error @ gram[matrix].double()) * error).sum(1).argmin())
                assert int(codes[matrix, j, row]) == best
                assert float(found[matrix, j, row]) == float(book[best] * norms[matrix, row])
                assert float(changes[matrix, j, row]) == pytest.approx(float(tries[best, j] - now[j]), abs=1e-5)
                now = tries[best]
