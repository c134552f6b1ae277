"""A group rounded by the native core against torch: every byte, on every format and instruction set that this processor has."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import BITS, CodebookFormat, published_codebook
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels import dispatch
from kappaquant.kernels.cpu import feedback, library
from kappaquant.quantizing.rounding import feedback as rounding
from kappaquant.quantizing.rounding import groups

if library.absence():
    pytest.skip(library.absence(), allow_module_level=True)
LEVELS = [name for name, here in library.levels().items() if here]
FORMATS = [CodebookFormat(bits, group) for bits in BITS for group in GROUP_SIZES]
ROWS = (1, 3, 17, 100)
SCALES = (1.0, 0.88, 0.94, 1.06, 1.12)
Parts = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def known(size: int) -> rounding.Inputs:
    """Two matrices of three groups of inputs, of which some count more."""
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(2, 4 * size, 3 * size, generator=draw) * torch.rand(3 * size, generator=draw)
    return rounding.prepare(x.mT @ x, size, ["a", "b"])


class Group:
    """The middle one of three, of two matrices of so many rows: all parts are views into larger tensors; a row is 0, and a norm."""

    def __init__(self, fmt: CodebookFormat, rows: int) -> None:
        size, draw = fmt.group_size, torch.Generator().manual_seed(rows)
        some, seen = slice(size, 2 * size), known(size)
        self.fmt, self.block = fmt, torch.randn(2, 3 * size, rows, generator=draw)[:, some]
        self.values, self.norms = (
            torch.randn(2, 3 * size, rows, generator=draw)[:, some],
            torch.rand(2, rows, generator=draw) * size**0.5,
        )
        self.block[1, :, 0] = 0
        self.norms[1, -1] = 0
        self.upper, self.gram = (part[:, some, some] for part in (seen.upper, seen.gram))
        self.inverses = (1 / seen.gram.diagonal(dim1=1, dim2=2))[:, some]
        self.left = self.gram @ (self.block - self.values)

    def natively(self, level: str) -> tuple[Parts, Parts]:
        return (
            feedback.choose(self.block, self.upper, SCALES, self.fmt, level=level),
            feedback.descend(self.left, self.values, self.norms, self.gram, self.inverses, self.fmt, level=level),
        )  # fmt: skip

    def by_groups(self) -> tuple[Parts, Parts]:
        return (
            groups.choose(self.block, self.upper, SCALES, self.fmt),
            groups.descend(self.left, self.values, self.norms, self.gram, self.inverses, self.fmt),
        )  # fmt: skip


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FEEDBACKS", ())


def same(found: tuple[Parts, Parts], expected: tuple[Parts, Parts]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for mine, theirs in zip(found, expected, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_the_bytes_are_those_of_torch(level: str, fmt: CodebookFormat) -> None:
    for rows in ROWS:
        group = Group(fmt, rows)
        assert same(group.natively(level), group.by_groups()), rows


@pytest.mark.usefixtures("torch_only")
def test_other_codebooks_and_wide_norms(level: str) -> None:
    for fmt in (
        CodebookFormat(3, 64, norms="F32"),
        CodebookFormat(4, 128, published_codebook(4, 128), "F32"),
        CodebookFormat(2, 128, (-0.3, -0.01, 0.01, 0.3), "F32"),
    ):
        group = Group(fmt, 17)
        assert same(group.natively(level), group.by_groups()), fmt.id


@pytest.mark.usefixtures("torch_only")
def test_norms_that_are_beyond_what_is_stored(level: str) -> None:
    """Of those tried some are larger, and become the largest that is stored."""
    group = Group(CodebookFormat(3, 64), 17)
    group.block *= 62000 / group.block.norm(dim=1, keepdim=True).clamp(min=1)
    found = group.natively(level)
    assert same(found, group.by_groups())
    assert found[0][1].max() == 65504


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("bits", BITS)
def test_numbers_that_are_none_are_survived(level: str, value: float, bits: int) -> None:
    """And stay in their row."""
    group = Group(CodebookFormat(bits, 64), 100)
    fine = group.natively(level)
    group.block[0, 5, 7] = group.left[0, 5, 7] = group.values[1, 63, 99] = value
    others = torch.ones(2, 100, dtype=torch.bool)
    others[0, 7] = others[1, 99] = False
    for mine, theirs in zip(group.natively(level), fine, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            each = others if a.dim() == 2 else others[:, None].expand_as(a)
            assert torch.equal(a[each], b[each])


def test_any_number_of_threads_gives_the_same(level: str) -> None:
    group, before = Group(CodebookFormat(4, 64), 700), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = group.natively(level)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert same(group.natively(level), expected)
    finally:
        torch.set_num_threads(before)


def test_dispatch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(CodebookFormat(3, 64), 17)
    natively = group.natively("")
    with monkeypatch.context() as without:
        without.setattr(groups, "feed", None)
        without.setattr(groups, "_Book", None)
        assert same(group.by_groups(), natively)
    monkeypatch.setattr(feedback, "absence", lambda: "there is none")
    monkeypatch.setattr(feedback, "_run", None)
    assert same(group.by_groups(), natively)


def test_whole_matrices_have_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, draw = CodebookFormat(3, 64), torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(2, 37, 150, generator=draw), known(64)
    with_core = rounding.encode(weight, fmt, inputs)
    monkeypatch.setattr(dispatch, "_FEEDBACKS", ())
    without = rounding.encode(weight, fmt, inputs)
    assert all(torch.equal(part, without.parts[suffix]) for suffix, part in with_core.parts.items())
    assert torch.equal(with_core.weighted_errors, without.weighted_errors)


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    block, fmt = torch.zeros(1, 32, 4), CodebookFormat(3, 32)
    assert feedback.refusal(block) is None
    assert feedback.refusal(block.to("meta")) == "runs on CPUs"
    assert "float64" in str(feedback.refusal(block.double()))
    assert feedback.refusal(block[:, :16]) == "takes groups of 32, 64, 128, 256, not 16"
    monkeypatch.setattr(feedback, "absence", lambda: "there is none")
    with pytest.raises(UnsupportedError, match="native feedback: there is none"):
        feedback.choose(block, torch.eye(32)[None], SCALES, fmt)
    with pytest.raises(UnsupportedError, match="native feedback: there is none"):
        feedback.descend(block, block, torch.zeros(1, 4), torch.eye(32)[None], torch.ones(1, 32), fmt)


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_round(level: str, shape: tuple[int, int]) -> None:
    group = Group(CodebookFormat(3, 32), 5)
    for part in ("block", "values", "left"):
        setattr(group, part, torch.empty(shape[0], 32, shape[1]))
    group.norms = torch.empty(shape)
    group.upper, group.gram, group.inverses = (x[: shape[0]] for x in (group.upper, group.gram, group.inverses))
    assert same(group.natively(level), group.by_groups())
