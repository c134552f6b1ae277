"""The kernels that round a group to trellis codes against torch: closed paths that lose the same, on every format and odd shapes."""

from __future__ import annotations

import re

import pytest
import torch
from hard_weights import numbers
from nvrtc_here import ARCHITECTURES, needs_compiler
from other_trellises import Sixteen
from trellis_rounding import MORE, SCALES, check_losses, check_that_it_stays_in_its_row, problem

from kappaquant.errors import UnsupportedError
from kappaquant.formats import trials, viterbi
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.formats.trellis import SUBSETS, TRELLIS, TRELLIS_BITS, TRELLIS_FORMATS, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.cuda import nvrtc, trellis_feedback
from kappaquant.quantizing.rounding import feedback as rounding
from kappaquant.quantizing.rounding import rings

FORMATS = [*TRELLIS_FORMATS.values()]
gpu = pytest.mark.gpu


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    for bits, group in zip((2, 3, 4, 4), GROUP_SIZES, strict=True):
        fmt = TrellisFormat(bits, group)
        for kernel, instance in (
            ("trellis_feedback", trellis_feedback.instance(fmt)),
            ("trellis_norms", f"trellis_norms<{group}, {bits}>"),
        ):
            code, name = nvrtc.compiled(f"{kernel}.cu", instance, arch)
            assert code.startswith(b"\x7fELF")
            assert kernel.encode() in name


def test_refusals_say_why() -> None:
    fmt, block = TrellisFormat(3, 32), torch.zeros(1, 32, 4)
    assert "float32" in str(trellis_feedback.refusal(block.double(), fmt))
    assert "takes groups of 32, 64, 128, 256, not 16" in str(trellis_feedback.refusal(block[:, :16], fmt))
    assert "searches Trellis" in str(trellis_feedback.refusal(block, Sixteen(3, 32)))
    skewed = fmt.variant((*fmt.codebook[:-1], 2 * fmt.codebook[-1]), "F16")
    assert "symmetric" in str(trellis_feedback.refusal(block, skewed))
    for call in (
        lambda: trellis_feedback.choose(block, torch.eye(32)[None], SCALES, fmt),
        lambda: trellis_feedback.feed(block, torch.zeros(1, 1, 4), torch.eye(32)[None], fmt),
        lambda: trellis_feedback.plain_norms(block, fmt),
    ):
        with pytest.raises(UnsupportedError, match="cuda trellis feedback: needs an NVIDIA GPU"):
            call()


def test_tables_fit_the_kernels() -> None:
    constants = dict(re.findall(r"(\w+) = (\d+)[,;]", nvrtc._read("trellis_search.cuh")))
    assert int(constants["MEMORY"]) == TRELLIS.memory
    assert int(constants["MOST_CHOICES"]) == trellis_feedback._CHOICES == 1 << (TRELLIS_BITS[-1] - 1)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_levels_and_steps_are_those_of_the_search(bits: int) -> None:
    """Subsets 3 and 1 mirrored, and steps that forget or take the other bit, are left to the kernel."""
    fmt = TrellisFormat(bits, 64)
    levels, told = torch.tensor(fmt.codebook), trellis_feedback._levels(fmt.codebook)
    each = len(levels) // SUBSETS
    for side, subset in ((0, 0), (1, 2)):
        own = levels[subset::SUBSETS]
        assert told.values[side][:each] == own.tolist()
        assert told.values[side][:each] == (-levels[3 - subset :: SUBSETS]).flip(0).tolist()
        assert told.middles[side][: each - 1] == ((own[1:] + own[:-1]) / 2).tolist()
    branches = viterbi.branches(TRELLIS, torch.device("cpu"))
    for state in range(TRELLIS.states):
        for bit in (0, 1):
            before, oldest = state % (TRELLIS.states // 2), state // (TRELLIS.states // 2)
            mine = (told.lower >> before & 1) + 2 * (told.upper >> before & 1)
            theirs = int(branches[oldest][(state << 1 | bit) % TRELLIS.states])
            assert mine ^ (2 * (bit ^ oldest)) == theirs


@gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_it_loses_what_torch_loses(fmt: TrellisFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(fmt.group_size, 37, "cuda")
    found = trellis_feedback.choose(*given, SCALES, fmt)
    monkeypatch.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
    check_losses(found, rings.choose(*given, SCALES, fmt), *given, fmt)


@gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_norms_are_those_of_torch(fmt: TrellisFormat) -> None:
    block, _ = problem(fmt.group_size, 37, "cuda")
    norms = trials.multiples(trellis_feedback.plain_norms(block, fmt), SCALES, fmt)
    known = trials.tried_norms(block, SCALES, fmt)
    assert torch.equal(norms, known)
    assert (norms[:, 1, 0] == 0).all()


@gpu
def test_whole_matrices_lose_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = TrellisFormat(3, 128)
    x = numbers(3, 4096, 500) * torch.rand(500, generator=torch.Generator().manual_seed(0))
    weight, gram = numbers(3, 200, 500, seed=1).cuda(), (x.mT @ x).cuda()
    inputs = rounding.prepare(rounding.rotated(gram, fmt), 128, ["a", "b", "c"])
    with monkeypatch.context() as only:
        only.setattr(rings, "feed", None)
        with_kernel = rounding.encode(weight, fmt, inputs)
    monkeypatch.setattr(dispatch, "_TRELLIS_FEEDBACKS", ())
    without = rounding.encode(weight, fmt, inputs)
    torch.testing.assert_close(with_kernel.weighted_errors.sum(), without.weighted_errors.sum(), rtol=MORE, atol=0)


@gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_numbers_that_are_none_are_survived(value: float) -> None:
    fmt, (block, upper) = TrellisFormat(3, 32), problem(32, 19, "cuda")
    check_that_it_stays_in_its_row(
        value, lambda given: trellis_feedback.choose(given, upper, SCALES, fmt), block, len(fmt.codebook)
    )


@gpu
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_round(shape: tuple[int, int]) -> None:
    block, upper = torch.empty(shape[0], 32, shape[1], device="cuda"), torch.eye(32, device="cuda")
    found = trellis_feedback.choose(block, upper.expand(shape[0], 32, 32), SCALES, TrellisFormat(3, 32))
    assert [part.shape for part in found] == [block.shape, shape, block.shape]
