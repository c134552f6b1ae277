"""Error feedback: the textbook's codes, never a row that is worse than without it, and inputs that cannot be used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kappaquant.errors import NonFiniteError
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.quantizing.rounding import feedback

WIDTH = 192


def correlated(width: int, seed: int = 0) -> Tensor:
    """Inputs [2000, width] of few directions that count, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    energy = torch.arange(1, width + 1).float() ** -0.6
    return torch.randn(2000, width, generator=generator) * energy @ basis.t()


def weighted(weight: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """[N] sum over inputs of the squared error of a row's output."""
    return ((weight - other).double() @ x.double().t()).square().sum(1)


def prepared(x: Tensor, fmt: GroupedFormat) -> feedback.Inputs:
    return feedback.prepare(feedback.rotated((x.t() @ x)[None], fmt), fmt.group_size, ["weight"])


def textbook(row: Tensor, inputs: feedback.Inputs, norms: Tensor, fmt: CodebookFormat) -> list[int]:
    """One row, one input at a time in float64: what is left is moved to where it best makes up for what is fixed."""
    book, gram = torch.tensor(fmt.codebook).double(), inputs.gram[0].double()
    order = (inputs.order[0, :, None] * fmt.group_size + torch.arange(fmt.group_size)).flatten()
    row, fixed, codes = row.double(), torch.zeros(len(row), dtype=torch.float64), [0] * len(row)
    for at, j in enumerate(order.tolist()):
        done, rest = order[:at], order[at:]
        wanted = row[j]
        if at:
            left = gram[rest][:, done] @ (row[done] - fixed[done])
            wanted = wanted + torch.linalg.solve(gram[rest][:, rest], left)[0]
        norm = norms[j // fmt.group_size].double()
        codes[j] = int((wanted - book * norm).abs().argmin())
        fixed[j] = book[codes[j]] * norm
    return codes


def test_codes_are_the_textbooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "_SCALES", (1.0,))
    fmt, x = CodebookFormat(3, 32), correlated(96)
    inputs = prepared(x, fmt)
    target = fmt.rotate(torch.randn(6, 96, generator=torch.Generator().manual_seed(1)))
    found = feedback._feed_back(feedback._Aim(target.t().contiguous()[None], fmt, inputs.gram), inputs)
    expected = [textbook(row, inputs, norms, fmt) for row, norms in zip(target, found.norms[0].t(), strict=True)]
    assert (
        found.codes[0].t() == torch.tensor(expected)
    ).float().mean() > 0.99  # a tie in float32 may fall the other way


EACH = [
    *(CodebookFormat(bits, group) for bits in BITS for group in (32, 128)),
    TrellisFormat(2, 32),
    TrellisFormat(3, 64),
]


@pytest.mark.parametrize("fmt", EACH, ids=lambda f: f.id)
def test_no_row_is_worse_and_all_together_are_much_better(fmt: GroupedFormat) -> None:
    x, group = correlated(WIDTH), fmt.group_size
    rows = 16 if isinstance(fmt, TrellisFormat) else 48
    weight = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(fmt.bits))
    inputs = prepared(x, fmt)
    made = feedback.encode(weight[None], fmt, inputs)
    parts = {suffix: part[0] for suffix, part in made.parts.items()}
    decoded = fmt.decode(parts, WIDTH)
    plain = fmt.decode(fmt.encode(weight).parts, WIDTH)
    target = fmt.rotate(weight)
    errors = (target - fmt.rotate(each) for each in (decoded, plain))
    with_feedback, without = ((error @ inputs.gram[0] * error).sum(1) for error in errors)
    assert (with_feedback <= without * (1 + 1e-3)).all()
    assert weighted(weight, decoded, x).sum() < 0.6 * weighted(weight, plain, x).sum()
    if WIDTH % group == 0:  # else padding is rounded too
        torch.testing.assert_close(made.weighted_errors[0], with_feedback, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(made.squared_errors[0], (weight - decoded).square().sum(1), rtol=1e-3, atol=1e-5)
    assert {s: (p.dtype, tuple(p.shape)) for s, p in parts.items()} == {
        s: (p.dtype, tuple(p.shape)) for s, p in fmt.encode(weight).parts.items()
    }


def test_inputs_without_a_direction_change_nothing_for_the_worse() -> None:
    fmt, x = CodebookFormat(3, 32), torch.eye(64)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    decoded = fmt.decode(feedback.encode(weight[None], fmt, prepared(x, fmt)).parts, 64)[0]
    plain = fmt.decode(fmt.encode(weight).parts, 64)
    assert not decoded[3].any()
    assert (weight - decoded).square().sum() <= (weight - plain).square().sum()


def test_damping_is_raised_until_it_does_and_said(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.eye(64).repeat(3, 1, 1)
    gram[1, 5, 5] = -0.05
    found = feedback.prepare(gram, 32, ["a", "model.layers.0.x", "b"])
    assert found.damping == pytest.approx([0.01, 0.1, 0.01])
    torch.testing.assert_close(
        found.gram.diagonal(dim1=1, dim2=2).mean(1), torch.tensor([1.01, (63 - 0.05) / 64 * 1.1, 1.01])
    )
    product = (found.upper.mT @ found.upper)[1]  # of H^-1, groups in their order
    back = (found.order[1].argsort()[:, None] * 32 + torch.arange(32)).flatten()
    torch.testing.assert_close(product[back][:, back] @ found.gram[1], torch.eye(64), rtol=1e-3, atol=1e-3)
    assert "a: second" not in caplog.text
    assert (
        "model.layers.0.x: second moments of its inputs are not positive definite; damping raised to 0.1" in caplog.text
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_moments_that_say_nothing(value: float) -> None:
    with pytest.raises(NonFiniteError, match="y: the calibration text gives its inputs a mean square of"):
        feedback.prepare(torch.full((1, 32, 32), value), 32, ["y"])


def test_a_weight_that_is_not_finite() -> None:
    fmt = CodebookFormat(3, 32)
    weight = torch.randn(4, 64)
    weight[2, 7] = torch.nan
    with pytest.raises(NonFiniteError, match="z: holds nan"):
        feedback.encode(weight[None], fmt, prepared(correlated(64), fmt), "z")


def test_trellis_codes_lose_less_than_codes_of_the_same_bytes() -> None:
    x, weight = correlated(128), torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))
    made = [feedback.encode(weight, fmt, prepared(x, fmt)) for fmt in (CodebookFormat(3, 64), TrellisFormat(3, 64))]
    scalar, trellis = (each.weighted_errors.sum() for each in made)
    assert trellis < 0.8 * scalar


def test_matrices_of_a_stack_are_rounded_as_each_alone() -> None:
    """Each for its own inputs, and in its own order of groups."""
    fmt, generator = CodebookFormat(3, 32), torch.Generator().manual_seed(0)
    weight, xs = torch.randn(3, 24, 96, generator=generator), [correlated(96, seed) for seed in range(3)]
    grams = feedback.rotated(torch.stack([x.t() @ x for x in xs]), fmt)
    together = feedback.encode(weight, fmt, feedback.prepare(grams, 32, ["a", "b", "c"]))
    for at, x in enumerate(xs):
        alone = feedback.encode(weight[at : at + 1], fmt, prepared(x, fmt))
        torch.testing.assert_close(together.weighted_errors[at], alone.weighted_errors[0], rtol=0.05, atol=0)
        same = together.parts[".tq_packed"][at] == alone.parts[".tq_packed"][0]
        assert same.float().mean() > 0.98  # products of more rows may be rounded otherwise


def test_refitted_norms_are_least_squares() -> None:
    """Against a solution in float64 of each row by itself, rows in several pieces; what is lost is what the state says."""
    fmt, x = CodebookFormat(3, 32), correlated(96)
    inputs = prepared(x, fmt)
    target = fmt.rotate(torch.randn(20, 96, generator=torch.Generator().manual_seed(1))).t().contiguous()[None]
    aim = feedback._Aim(target, fmt, inputs.gram)
    found = feedback._feed_back(aim, inputs)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(feedback, "_REFITTED", {"cpu": 7 * 96})
        refitted = feedback._refit(found, aim)
    book, root = torch.tensor(fmt.codebook).double(), torch.linalg.cholesky(inputs.gram[0].double()).mT
    for row in range(20):
        unit = torch.block_diag(*book[found.codes[0, :, row].int()].view(3, 32, 1))
        wanted = torch.linalg.lstsq(root @ unit, root @ target[0, :, row, None].double()).solution.flatten()
        torch.testing.assert_close(refitted.norms[0, :, row].double(), wanted, rtol=1e-3, atol=0)
    for state in (refitted, feedback._descend(refitted, aim)):
        again = aim.state(state.codes, state.norms)
        torch.testing.assert_close(state.lost, again.lost, rtol=1e-4, atol=0)
        torch.testing.assert_close(state.left, again.left, rtol=1e-3, atol=1e-3 * float(again.left.abs().max()))


def test_triangles_are_inverted_by_halves() -> None:
    for width in (1, 256, 257, 700):
        lower = torch.randn(width, width, generator=torch.Generator().manual_seed(width)).double().tril()
        lower += 3 * width**0.5 * torch.eye(width)
        found = feedback._inverse(lower)
        assert not found.triu(1).any()
        torch.testing.assert_close(found @ lower, torch.eye(width).double())


def test_norms_at_the_end_of_what_is_stored() -> None:
    """A tried norm that float16 cannot hold is not tried, rather than making numbers that are none of everything."""
    fmt, weight = CodebookFormat(3, 32), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight *= 64000 / weight.view(8, 2, 32).norm(dim=2).max()
    made = feedback.encode(weight[None], fmt, prepared(correlated(64), fmt))
    assert made.weighted_errors.isfinite().all()
    assert made.parts[".tq_norms"].isfinite().all()
