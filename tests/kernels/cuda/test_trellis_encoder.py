"""The CUDA encoder of trellis codes against the codec on the CPU: every byte, on every format; what it relies on, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from hard_weights import numbers
from nvrtc_here import ARCHITECTURES, needs_compiler
from other_trellises import OTHERS
from torch import Tensor
from trellis_encoding import DTYPES, FAR_AND_EQUAL, NORMLESS, expected, refused, same_bytes, variants

from kappaquant.errors import PlanError, UnsupportedError
from kappaquant.formats import codec, viterbi
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import TRELLIS_BITS, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.cuda import nvrtc, trellis_encoder
from kappaquant.kernels.cuda.arguments import KINDS

gpu = pytest.mark.gpu


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    for bits, group in [(3, 128), *zip(TRELLIS_BITS, (32, 64, 256), strict=True)]:
        code, name = nvrtc.compiled("trellis_encode.cu", f"trellis_encode<{group}, {bits}, 2>", arch)
        assert code.startswith(b"\x7fELF")
        assert b"trellis_encode" in name


def test_numbers_are_the_kernels() -> None:
    constants = dict(re.findall(r"(\w+) = (\d+)[,;]", nvrtc._read("trellis_rings.cuh")))
    assert int(constants["RINGS"]) == trellis_encoder.RINGS
    assert int(constants["TRIALS"]) == trellis_encoder._TRIALS >= len(viterbi.SCALES)
    assert set(DTYPES) == KINDS.keys()


def test_without_a_gpu_others_encode() -> None:
    weight, fmt = numbers(4, 200), TrellisFormat(3, 128)
    assert torch.equal(dispatch.encode(weight, fmt).parts[".tq_packed"], codec.encode(weight, fmt).packed)
    with pytest.raises(UnsupportedError, match="cuda trellis encoder: needs an NVIDIA GPU"):
        trellis_encoder.encode(weight, fmt)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_trellises_are_refused(kind: type[TrellisFormat]) -> None:
    reason = trellis_encoder.refusal(numbers(2, 64), "best", kind(3, 32))
    assert reason == f"searches Trellis(lower=(2, 4, 5), upper=(0, 1, 6)), not {kind.code}"


def same(weight: Tensor, fmt: TrellisFormat, effort: Effort, known: codec.CodebookEncoded | None = None) -> bool:
    known = known or codec.encode(weight, fmt, effort)
    found = trellis_encoder.encode(weight.cuda(), fmt, effort)
    assert found.squared_error == pytest.approx(known.squared_error, rel=1e-12)  # of the same terms in another order
    assert found.energy == pytest.approx(known.energy, rel=1e-12)
    return same_bytes(found, known)


@gpu
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("fmt", list(variants()), ids=lambda fmt: fmt.key)
def test_the_bytes_are_the_codecs(fmt: TrellisFormat, effort: Effort) -> None:
    for dtype in DTYPES:
        weight, known = expected(fmt, effort, dtype)
        assert same(weight, fmt, effort, known), dtype


@gpu
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_paths_that_cost_the_same(group: int, effort: Effort) -> None:
    """A coordinate, whose rotation has one magnitude, and whole numbers; a last block of fewer rings than others."""
    eye = torch.eye(group)
    for weight in (torch.cat([eye, -eye, 1 - 2 * eye])[3:], numbers(50, group).mul(2).round()):
        assert same(weight, TrellisFormat(3, group), effort)


@gpu
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(
    "weight", [numbers(2, 3, 33), numbers(1, 5), numbers(64, 20).t()], ids=["3d", "narrow", "strided"]
)
def test_shapes(weight: Tensor, effort: Effort) -> None:
    assert same(weight, TrellisFormat(3, 32), effort)


@gpu
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("book", FAR_AND_EQUAL, ids=["far", "equal"])
def test_other_levels(book: tuple[float, ...], effort: Effort) -> None:
    assert same(numbers(24, 100).bfloat16(), TrellisFormat(2, 32, book, "F32"), effort)


@gpu
def test_many_rings() -> None:
    assert same(numbers(3000, 500, seed=1).bfloat16(), TrellisFormat(3, 128), "best")


@gpu
@pytest.mark.parametrize("value", NORMLESS)
def test_what_has_no_norm_is_refused_as_the_codec_does(value: float) -> None:
    weight, fmt = numbers(8, 300), TrellisFormat(3, 128)
    weight[3, 7] = value
    known = refused(lambda: codec.encode(weight, fmt, name="the.weight"))
    assert refused(lambda: dispatch.encode(weight.cuda(), fmt, name="the.weight")) == known


@gpu
def test_dispatch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the codec where it refuses, which gives the same bytes on a GPU as well."""
    weight, fmt = numbers(40, 200).cuda(), TrellisFormat(3, 128)
    with monkeypatch.context() as without:
        without.setattr(codec, "encode", None)
        found = dispatch.encode(weight, fmt).parts[".tq_packed"]
    assert torch.equal(dispatch.encode(weight.double(), fmt).parts[".tq_packed"], found)
    with pytest.raises(PlanError, match="effort 'most'"):
        dispatch.encode(weight, fmt, "most")  # type: ignore[arg-type]


@gpu
@pytest.mark.parametrize("shape", [(0, 128), (4, 0)])
def test_nothing_to_encode(shape: tuple[int, ...]) -> None:
    fmt = TrellisFormat(3, 128)
    known, found = codec.encode(torch.empty(shape), fmt), trellis_encoder.encode(torch.empty(shape).cuda(), fmt)
    assert (found.packed.shape, found.norms.shape) == (known.packed.shape, known.norms.shape)
    assert (found.squared_error, found.energy) == (0.0, 0.0)
