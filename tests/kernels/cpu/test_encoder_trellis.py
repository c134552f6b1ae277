"""The native encoder of trellis codes against the codec: every byte, on every format, effort and instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hard_weights import numbers
from other_trellises import OTHERS
from torch import Tensor
from trellis_encoding import DTYPES, FAR_AND_EQUAL, NORMLESS, expected, refused, same_bytes, variants

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.trellis import Trellis, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.cpu import encoder, library

if library.absence():
    pytest.skip(library.absence(), allow_module_level=True)
LEVELS = [name for name, here in library.levels().items() if here]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def same(found: codec.CodebookEncoded, known: codec.CodebookEncoded) -> bool:
    return same_bytes(found, known) and (found.squared_error, found.energy) == (known.squared_error, known.energy)


def in_turn() -> Iterator[tuple[TrellisFormat, torch.dtype]]:
    """Every format, and dtypes of weights in turn."""
    for number, fmt in enumerate(variants()):
        yield fmt, DTYPES[(number // 2 + number % 2) % 3]


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(("fmt", "dtype"), list(in_turn()), ids=lambda value: getattr(value, "key", str(value)))
def test_the_bytes_are_the_codecs(level: str, fmt: TrellisFormat, dtype: torch.dtype, effort: Effort) -> None:
    weight, known = expected(fmt, effort, dtype)
    assert same(encoder.encode(weight, fmt, effort, level=level), known)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(
    "weight", [numbers(2, 3, 33), numbers(1, 5), numbers(64, 20).t()], ids=["3d", "narrow", "strided"]
)
def test_shapes(level: str, weight: Tensor, effort: Effort) -> None:
    fmt = TrellisFormat(3, 32)
    assert same(encoder.encode(weight, fmt, effort, level=level), codec.encode(weight, fmt, effort))


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_trellises(level: str, kind: type[TrellisFormat], effort: Effort) -> None:
    weight, known = expected(kind(3, 64), effort, torch.float32)
    assert same(encoder.encode(weight, kind(3, 64), effort, level=level), known)


@pytest.mark.parametrize("effort", EFFORTS)
def test_other_levels(level: str, effort: Effort) -> None:
    weight = numbers(24, 100).bfloat16()
    for book in FAR_AND_EQUAL:
        fmt = TrellisFormat(2, 32, book, "F32")
        assert same(encoder.encode(weight, fmt, effort, level=level), codec.encode(weight, fmt, effort))


@pytest.mark.parametrize("value", NORMLESS)
def test_what_has_no_norm_is_refused_as_the_codec_does(level: str, value: float) -> None:
    weight, fmt = numbers(8, 300), TrellisFormat(3, 128)
    weight[3, 7] = value
    known = refused(lambda: codec.encode(weight, fmt, name="the.weight"))
    assert refused(lambda: encoder.encode(weight, fmt, name="the.weight", level=level)) == known


def test_dispatch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the codec where it refuses, which gives the same bytes."""
    weight, fmt = numbers(4, 200), TrellisFormat(3, 128)
    known = codec.encode(weight, fmt)
    with monkeypatch.context() as without:
        without.setattr(codec, "encode", None)
        assert torch.equal(dispatch.encode(weight, fmt).parts[".tq_packed"], known.packed)
    assert torch.equal(dispatch.encode(weight.double(), fmt).parts[".tq_packed"], known.packed)
    monkeypatch.setattr(encoder, "absence", lambda: "there is none")
    assert torch.equal(dispatch.encode(weight, fmt).parts[".tq_packed"], known.packed)


def test_trellises_that_it_does_not_search_are_refused() -> None:
    class Large(TrellisFormat):
        code = Trellis((2,), (0, 7))

    class Both(TrellisFormat):
        code = Trellis((0, 2), (0, 3))

    weight = numbers(2, 64)
    assert encoder.refusal(weight, "best", Large(3, 32)) == "searches trellises of 4 to 64 states, not of 128"
    with pytest.raises(UnsupportedError, match="upper parity alone counts the newest and the oldest bit, not Trellis"):
        encoder.encode(weight, Both(3, 32))


@pytest.mark.parametrize("shape", [(0, 128), (4, 0)])
def test_nothing_to_encode(level: str, shape: tuple[int, ...]) -> None:
    fmt = TrellisFormat(3, 128)
    known, found = codec.encode(torch.empty(shape), fmt), encoder.encode(torch.empty(shape), fmt, level=level)
    assert (found.packed.shape, found.norms.shape) == (known.packed.shape, known.norms.shape)
    assert found.squared_error == 0


def test_any_number_of_threads_gives_the_same(level: str) -> None:
    weight, fmt, before = numbers(300, 256), TrellisFormat(3, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        known = encoder.encode(weight, fmt, "fast", level=level)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert same(encoder.encode(weight, fmt, "fast", level=level), known)
    finally:
        torch.set_num_threads(before)
