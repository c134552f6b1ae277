"""A group's trellis codes by the native core against torch: closed paths that lose the same, on every format and instruction set."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from other_trellises import OTHERS
from trellis_rounding import SCALES, Parts, check_losses, check_that_it_stays_in_its_row, problem

from kappaquant.errors import UnsupportedError
from kappaquant.formats.trellis import TRELLIS_FORMATS, Trellis, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.cpu import feedback, library
from kappaquant.quantizing.rounding import rings

if library.absence():
    pytest.skip(library.absence(), allow_module_level=True)
LEVELS = [name for name, here in library.levels().items() if here]
FORMATS = [*TRELLIS_FORMATS.values(), *(kind(3, 32) for kind in OTHERS)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def by_torch(fmt: TrellisFormat, rows: int) -> Parts:
    with pytest.MonkeyPatch.context() as without:
        without.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
        return rings.choose(*problem(fmt.group_size, rows), SCALES, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.key)
def test_it_loses_what_torch_loses(level: str, fmt: TrellisFormat) -> None:
    rows = {32: 19, 64: 9, 128: 3, 256: 2}[fmt.group_size]
    given = problem(fmt.group_size, rows)
    check_losses(feedback.choose(*given, SCALES, fmt, level=level), by_torch(fmt, rows), *given, fmt)


def test_norms_are_those_of_the_dtype_and_no_larger_than_it_holds(level: str) -> None:
    for norms_dtype, largest in (("F16", 65504.0), ("F32", 1e5)):
        fmt = TrellisFormat(3, 32, norms=norms_dtype)
        block, upper = problem(32, 19)
        block = block * (66000 / block.norm(dim=1, keepdim=True).clamp(min=1))
        _, norms, _ = feedback.choose(block, upper, (1.0, 1.06), fmt, level=level)
        assert 60000 < float(norms.max()) <= largest
        assert torch.equal(norms, norms.half().float()) == (norms_dtype == "F16")


def test_any_number_of_threads_gives_the_same(level: str) -> None:
    fmt, before = TrellisFormat(2, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        known = feedback.choose(*problem(32, 300), SCALES, fmt, level=level)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            found = feedback.choose(*problem(32, 300), SCALES, fmt, level=level)
            assert all(torch.equal(a, b) for a, b in zip(found, known, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_numbers_that_are_none_are_survived(level: str, value: float) -> None:
    fmt, (block, upper) = TrellisFormat(3, 32), problem(32, 19)
    check_that_it_stays_in_its_row(
        value, lambda given: feedback.choose(given, upper, SCALES, fmt, level=level), block, len(fmt.codebook)
    )


def test_dispatch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = TrellisFormat(3, 32)
    natively = feedback.choose(*problem(32, 5), SCALES, fmt)
    with monkeypatch.context() as without:
        without.setattr(rings, "feed", None)
        found = rings.choose(*problem(32, 5), SCALES, fmt)
    assert all(torch.equal(a, b) for a, b in zip(found, natively, strict=True))
    monkeypatch.setattr(feedback, "absence", lambda: "there is none")
    monkeypatch.setattr(feedback, "_run", None)
    assert rings.choose(*problem(32, 5), SCALES, fmt)[0].shape == natively[0].shape


def test_trellises_that_it_does_not_search_are_refused() -> None:
    class Large(TrellisFormat):
        code = Trellis((2,), (0, 7))

    block, upper = problem(32, 5)
    assert feedback.refusal(block, Large(3, 32)) == "searches trellises of 4 to 64 states, not of 128"
    with pytest.raises(UnsupportedError, match="native feedback: searches trellises"):
        feedback.choose(block, upper, SCALES, Large(3, 32))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_round(level: str, shape: tuple[int, int]) -> None:
    block, upper = torch.empty(shape[0], 32, shape[1]), torch.eye(32).expand(shape[0], 32, 32)
    found = feedback.choose(block, upper, SCALES, TrellisFormat(3, 32), level=level)
    assert [part.shape for part in found] == [block.shape, shape, block.shape]
