"""The native encoder against the codec: every byte, on every format, effort and instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kappaquant.errors import NonFiniteError, PlanError, UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, CodebookFormat, published_codebook
from kappaquant.formats.search import SCALES, nearest
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels import dispatch
from kappaquant.kernels.cpu import encoder, library

if library.absence():
    pytest.skip(library.absence(), allow_module_level=True)
LEVELS = [name for name, here in library.levels().items() if here]
FORMATS = [CodebookFormat(bits, group) for bits in BITS for group in GROUP_SIZES]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, spread: float) -> Tensor:
    return numbers(*shape) * torch.exp(spread * numbers(*shape, seed=1))


def with_zeros(rows: int, columns: int, group: int) -> Tensor:
    weight = numbers(rows, columns)
    weight[::2] = 0.0
    weight[1, :group] = -0.0
    weight[3] = 0.25
    return weight


def at_thresholds(fmt: CodebookFormat) -> Tensor:
    """Rotated coordinates on decision thresholds, give or take the roundings of two rotations."""
    c = torch.tensor(fmt.codebook)
    exact = (c[1:] + c[:-1]) / 2
    index = torch.randint(len(exact), (40, fmt.group_size), generator=torch.Generator().manual_seed(0))
    return codec.unrotate(exact[index], fmt.group_size)


def cases(fmt: CodebookFormat) -> Iterator[tuple[str, Tensor]]:
    group = fmt.group_size
    for dtype in library.DTYPES:
        yield f"Gaussian {dtype}", numbers(13, 3 * group - 3).to(dtype)
        yield f"zeros and constants {dtype}", with_zeros(6, 2 * group, group).to(dtype)
        yield f"integers {dtype}", numbers(20, group).mul(2).round().to(dtype)
        yield f"tails {dtype}", heavy(17, 2 * group, spread=1.0).to(dtype)
    yield "three dimensions", numbers(2, 3, group + 1)
    yield "narrow", numbers(9, 5)
    yield "strided", numbers(3 * group, 20).t()
    yield "outliers", heavy(20, group, spread=2.0)
    yield "tiny", numbers(24, group) * torch.logspace(-38, -15, 24)[:, None]
    yield "squares below the smallest number", numbers(24, group) * torch.logspace(-24, -18, 24)[:, None]
    yield "large", numbers(10, group) * torch.logspace(0, 3, 10)[:, None]
    yield "one coordinate", torch.cat([torch.eye(group)[:20], 1 - 2 * torch.eye(group)[:20]])
    yield "at thresholds", at_thresholds(fmt)


def same(weight: Tensor, fmt: CodebookFormat, effort: Effort, level: str) -> bool:
    expected, found = codec.encode(weight, fmt, effort), encoder.encode(weight, fmt, effort, level=level)
    return (
        torch.equal(found.packed, expected.packed)
        and torch.equal(found.norms.view(torch.uint8), expected.norms.view(torch.uint8))
        and (found.squared_error, found.energy) == (expected.squared_error, expected.energy)
    )


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_the_bytes_are_the_codecs(level: str, fmt: CodebookFormat, effort: Effort) -> None:
    for label, weight in cases(fmt):
        assert same(weight, fmt, effort, level), label
        if weight.dtype == torch.bfloat16:
            assert same(weight, CodebookFormat(fmt.bits, fmt.group_size, norms="F32"), effort, level), label


@pytest.mark.parametrize("effort", EFFORTS)
def test_other_codebooks(level: str, effort: Effort) -> None:
    """Some with few different centroids of magnitudes, some with so many that they are looked up by cell."""
    weight = numbers(24, 500).bfloat16()
    for bits in (2, 3, 4):
        assert same(weight, CodebookFormat(bits, 128, published_codebook(bits, 128), "F32"), effort, level)
    for book in ((-1.0, -1 / 3, 1 / 3, 1.0), (-0.3, -0.01, 0.01, 0.3), (-1e-9, -1e-12, 1e-12, 1e-9), (0.01, 0.05, 0.1, 0.2)):  # fmt: skip
        assert same(weight, CodebookFormat(2, 128, book, "F32"), effort, level)
    upward = tuple(i / 1000 for i in range(-3, 125))
    assert len(nearest(upward, torch.device("cpu")).magnitude.unique()) > 64
    assert same(weight, CodebookFormat(7, 128, upward, "F32"), effort, level)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_errors_of_a_scan(level: str, group_size: int) -> None:
    """More groups than the codec takes at once: sums are its own to the last digit."""
    for weight in (numbers(900, 3 * group_size - 1), heavy(300, group_size, spread=1.0).bfloat16()):
        expected = codec.squared_errors(weight, group_size)
        assert encoder.squared_errors(weight, group_size, level=level) == expected
    assert encoder.squared_errors(weight, group_size, (), level=level) == {}
    assert list(encoder.squared_errors(weight, group_size, (5, 3), level=level)) == [5, 3]


def message(run: Callable[[], object]) -> str:
    with pytest.raises(NonFiniteError) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38, 7e5])
@pytest.mark.parametrize("bits", [3, 8])
def test_what_has_no_norm_is_refused_as_the_codec_does(level: str, value: float, bits: int) -> None:
    weight, fmt = numbers(8, 300), CodebookFormat(bits, 128)
    weight[3, 7] = value
    expected = message(lambda: codec.encode(weight, fmt, name="the.weight"))
    assert expected.startswith("the.weight: ")
    assert message(lambda: encoder.encode(weight, fmt, name="the.weight", level=level)) == expected
    assert message(lambda: encoder.squared_errors(weight, 128, name="the.weight", level=level)) == expected


def test_dispatch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the codec where it refuses, which gives the same bytes."""
    weight, fmt = numbers(4, 200), CodebookFormat(3, 128)
    plain, errors = codec.encode(weight, fmt), codec.squared_errors(weight, 128)
    with monkeypatch.context() as without:
        without.setattr(codec, "encode", None)
        without.setattr(codec, "squared_errors", None)
        assert torch.equal(dispatch.encode(weight, fmt).packed, plain.packed)
        assert dispatch.squared_errors(weight, 128) == errors
    assert torch.equal(dispatch.encode(weight.double(), fmt).packed, plain.packed)
    assert dispatch.squared_errors(weight.double(), 128) == errors
    with pytest.raises(PlanError, match="effort 'most'"):
        dispatch.encode(weight, fmt, "most")  # type: ignore[arg-type]


def test_refusals_say_why() -> None:
    weight, fmt = numbers(4, 200), CodebookFormat(3, 128)
    assert encoder.refusal(weight, "best") is None
    assert encoder.refusal(weight.to("meta")) == "runs on CPUs"
    assert "float64" in str(encoder.refusal(weight.double()))
    with pytest.raises(UnsupportedError, match="native encoder: knows efforts fast, best, not 'most'"):
        encoder.encode(weight, fmt, "most")  # type: ignore[arg-type]


def test_without_the_core_the_codec_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = numbers(4, 200), CodebookFormat(3, 128)
    monkeypatch.setattr(encoder, "absence", lambda: "there is none")
    assert torch.equal(dispatch.encode(weight, fmt).packed, codec.encode(weight, fmt).packed)
    assert dispatch.squared_errors(weight, 128) == codec.squared_errors(weight, 128)
    with pytest.raises(UnsupportedError, match="native encoder: there is none"):
        encoder.squared_errors(weight, 128)


@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (2, 0, 5)])
def test_nothing_to_encode(level: str, shape: tuple[int, ...]) -> None:
    fmt = CodebookFormat(3, 128)
    expected, found = codec.encode(torch.empty(shape), fmt), encoder.encode(torch.empty(shape), fmt, level=level)
    assert found.packed.shape == expected.packed.shape
    assert found.norms.shape == expected.norms.shape
    assert (found.squared_error, found.energy) == (0.0, 0.0)


def test_any_number_of_threads_gives_the_same(level: str) -> None:
    weight, fmt, before = numbers(700, 256), CodebookFormat(4, 64), torch.get_num_threads()
    expected = codec.encode(weight, fmt)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = encoder.encode(weight, fmt, level=level)
            assert torch.equal(found.packed, expected.packed)
            assert torch.equal(found.norms, expected.norms)
    finally:
        torch.set_num_threads(before)


def test_what_the_core_has_room_for() -> None:
    source = (library.Path(library.__file__).parent / "encode.h").read_text()
    assert f"kMostBooks = {len(BITS)};" in source
    assert f"kMagnitudes = {len(nearest(FORMATS[0].codebook, torch.device('cpu')).magnitude)};" in source
    assert len(SCALES) <= 32
    assert "kMostTrials = 32;" in source
