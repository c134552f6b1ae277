"""The CUDA encoder against the codec on the CPU: every byte, on every format; what it relies on, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from nvrtc_here import ARCHITECTURES, needs_compiler

from kappaquant.errors import NonFiniteError, PlanError, UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.base import EFFORTS, Effort
from kappaquant.formats.codebook import BITS, FORMATS, CodebookFormat, published_codebook
from kappaquant.formats.search import SCALES, Assignment, nearest
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels import dispatch as ops
from kappaquant.kernels.cuda import encoder, nvrtc
from kappaquant.kernels.cuda.arguments import KINDS

ALL = sorted(FORMATS.values(), key=lambda f: (f.bits, f.group_size))
CPU = torch.device("cpu")
gpu = pytest.mark.gpu


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def thresholds(fmt: CodebookFormat) -> torch.Tensor:
    c = torch.tensor(fmt.codebook)
    return (c[1:] + c[:-1]) / 2


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    for group in GROUP_SIZES:
        for kind in KINDS.values():
            code, name = nvrtc.compiled("encode.cu", f"encode<{group}, {kind}>", arch)
            assert code.startswith(b"\x7fELF")
            assert b"encode" in name


def test_tables_fit_the_kernel() -> None:
    source = nvrtc._read("encode.cu")
    constants = dict(re.findall(r"(\w+) = (\d+)[,;]", source))
    assert int(constants["MAGNITUDES"]) == len(nearest(CodebookFormat(3, 128).codebook, CPU).magnitude)
    assert int(constants["WIDTHS"]) == len(BITS)
    assert int(constants["CANDIDATES"]) >= len(SCALES)
    books = tuple(CodebookFormat(b, 128).codebook for b in BITS)
    tables, magnitudes = encoder._tables(books, CPU)
    assert len(tables) == sum(2 * 2**b for b in BITS)
    assert float(max(SCALES) * nearest(books[0], CPU).fineness) <= len(magnitudes) - 2


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_a_code_is_the_number_of_thresholds_below(fmt: CodebookFormat) -> None:
    """The kernel searches thresholds by halves, the codec looks cells up: the same codes, on ties and beside them too."""
    exact = thresholds(fmt)
    up, down = (torch.nextafter(exact, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    y = torch.cat([exact, up, down, random(1000) / 10, torch.tensor([0.0, -0.0, 1e30, -1e30])])[:, None].contiguous()
    table = nearest(fmt.codebook, CPU)
    assignment = Assignment(*y.shape, CPU)
    assignment.assign(y, table)
    ascending = encoder.thresholds(table)
    assert torch.equal(ascending[:-1], exact)
    assert torch.equal(assignment.codes.int(), (y > ascending).sum(1, keepdim=True, dtype=torch.int32))


def test_without_a_gpu_the_codec_encodes() -> None:
    weight, fmt = random(4, 200), CodebookFormat(3, 128)
    assert "NVIDIA GPU" in str(encoder.refusal(weight))
    assert torch.equal(ops.encode(weight, fmt).packed, codec.encode(weight, fmt).packed)
    assert ops.squared_errors(weight, 128) == codec.squared_errors(weight, 128)
    with pytest.raises(UnsupportedError, match="cuda encoder: needs an NVIDIA GPU"):
        encoder.encode(weight, fmt)
    with pytest.raises(UnsupportedError, match="cuda encoder: needs an NVIDIA GPU"):
        encoder.squared_errors(weight, 128)


def heavy(*shape: int, spread: float) -> torch.Tensor:
    return random(*shape) * torch.exp(spread * random(*shape, seed=1))


def with_zeros(rows: int, columns: int, group: int) -> torch.Tensor:
    weight = random(rows, columns)
    weight[::2] = 0.0
    weight[1, :group] = -0.0
    return weight


def one_hot(group: int) -> torch.Tensor:
    eye = torch.eye(group)
    return torch.cat([eye, -eye, 1 - 2 * eye])


def at_thresholds(fmt: CodebookFormat) -> torch.Tensor:
    """Rotated coordinates on decision thresholds, give or take the roundings of two rotations."""
    exact = thresholds(fmt)
    index = torch.randint(len(exact), (100, fmt.group_size), generator=torch.Generator().manual_seed(0))
    return codec.unrotate(exact[index], fmt.group_size)


def cases(fmt: CodebookFormat) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of any dtype, and of float32 only those that no other dtype holds."""
    group = fmt.group_size
    for dtype in KINDS:
        yield f"Gaussian {dtype}", random(37, 5 * group - 3).to(dtype)
        yield f"heavy tails {dtype}", heavy(40, 3 * group, spread=1.0).to(dtype)
        yield f"zeros {dtype}", with_zeros(6, 2 * group, group).to(dtype)
        yield f"integers {dtype}", random(50, group).mul(2).round().to(dtype)
    yield "three dimensions", random(2, 3, group + 1)
    yield "narrow", random(9, 5)
    yield "strided", random(3 * group, 20).t()
    yield "outliers", heavy(40, 3 * group, spread=2.0)
    yield "tiny", random(40, group) * torch.logspace(-38, -15, 40)[:, None]
    yield "squares below the smallest number", random(40, group) * torch.logspace(-24, -18, 40)[:, None]
    yield "large", random(20, group) * torch.logspace(0, 3, 20)[:, None]
    yield "one coordinate", one_hot(group)
    yield "at thresholds", at_thresholds(fmt)


def same(weight: torch.Tensor, fmt: CodebookFormat, effort: Effort) -> bool:
    expected = codec.encode(weight, fmt, effort)
    got = encoder.encode(weight.cuda(), fmt, effort)
    return (
        torch.equal(got.packed.cpu(), expected.packed)
        and torch.equal(got.norms.cpu().view(torch.uint8), expected.norms.view(torch.uint8))
        and got.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
        and got.energy == pytest.approx(expected.energy, rel=1e-6)
    )


@gpu
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_the_bytes_are_the_codecs(fmt: CodebookFormat, effort: Effort) -> None:
    for label, weight in cases(fmt):
        assert same(weight, fmt, effort), label
        if weight.dtype == torch.bfloat16:
            wide = CodebookFormat(fmt.bits, fmt.group_size, norms="F32")
            assert same(weight, wide, effort), f"{label}, float32 norms"


@gpu
@pytest.mark.parametrize("effort", EFFORTS)
def test_other_codebooks(effort: Effort) -> None:
    weight = random(64, 500).bfloat16()
    for bits in (2, 3, 4):
        assert same(weight, CodebookFormat(bits, 128, published_codebook(bits, 128), "F32"), effort)
    for book in ((-1.0, -1 / 3, 1 / 3, 1.0), (-0.3, -0.01, 0.01, 0.3), (-1e-9, -1e-12, 1e-12, 1e-9)):
        assert same(weight, CodebookFormat(2, 128, book, "F32"), effort)


@gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_errors_of_a_scan(group_size: int) -> None:
    for weight in (random(64, 3 * group_size - 1), heavy(300, group_size, spread=1.0).bfloat16()):
        expected = codec.squared_errors(weight, group_size)
        assert encoder.squared_errors(weight.cuda(), group_size) == pytest.approx(expected, rel=1e-6)
    assert encoder.squared_errors(weight.cuda(), group_size, ()) == {}
    assert list(encoder.squared_errors(weight.cuda(), group_size, (5, 3))) == [5, 3]


def message(run: Callable[[], object]) -> str:
    with pytest.raises(NonFiniteError) as caught:
        run()
    return str(caught.value)


@gpu
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38, 7e5])
def test_what_has_no_norm_is_refused_as_the_codec_does(value: float) -> None:
    weight, fmt = random(8, 300), CodebookFormat(3, 128)
    weight[3, 7] = value
    expected = message(lambda: codec.encode(weight, fmt, name="the.weight"))
    assert expected.startswith("the.weight: ")
    assert message(lambda: ops.encode(weight.cuda(), fmt, name="the.weight")) == expected
    assert message(lambda: ops.squared_errors(weight.cuda(), 128, name="the.weight")) == expected


@gpu
def test_what_the_kernel_does_not_take_goes_to_the_codec() -> None:
    weight, fmt = random(4, 200).cuda(), CodebookFormat(3, 128)
    assert "float64" in str(encoder.refusal(weight.double()))
    assert torch.equal(ops.encode(weight.double(), fmt).packed, ops.encode(weight, fmt).packed)
    with pytest.raises(PlanError, match="effort 'most'"):
        ops.encode(weight, fmt, "most")  # type: ignore[arg-type]


@gpu
@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (2, 0, 5)])
def test_nothing_to_encode(shape: tuple[int, ...]) -> None:
    expected, got = (
        codec.encode(torch.empty(shape), CodebookFormat(3, 128)),
        encoder.encode(torch.empty(shape).cuda(), CodebookFormat(3, 128)),
    )
    assert got.packed.shape == expected.packed.shape
    assert got.norms.shape == expected.norms.shape
    assert (got.squared_error, got.energy) == (0.0, 0.0)


@gpu
def test_more_groups_than_a_launch_has_warps() -> None:
    weight = random(70_001, 160, seed=3).bfloat16()
    assert same(weight, CodebookFormat(3, 32), "fast")
