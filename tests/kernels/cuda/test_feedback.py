"""The kernel that rounds a group against what it stands for: the same codes on every format, odd shapes, matrices inside larger ones."""

from __future__ import annotations

import pytest
import torch
from nvrtc_here import ARCHITECTURES, needs_compiler

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import BITS, FORMATS, CodebookFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels.cuda import feedback, nvrtc
from kappaquant.quantizing.rounding import feedback as rounding
from kappaquant.quantizing.rounding import groups

ALL = sorted(FORMATS.values(), key=lambda f: (f.bits, f.group_size))


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    for bits, again in ((BITS[0], "false"), (BITS[-1], "true")):
        for group in GROUP_SIZES:
            code, name = nvrtc.compiled("feedback.cu", f"feedback<{bits}, {group}, {again}>", arch)
            assert code.startswith(b"\x7fELF")
            assert b"feedback" in name


def test_refusals_say_why() -> None:
    fmt, block = CodebookFormat(3, 32), torch.zeros(1, 32, 4)
    assert "float32" in str(feedback.refusal(block.double()))
    assert "whole warps" in str(feedback.refusal(block[:, :16]))
    with pytest.raises(UnsupportedError, match="cuda feedback: needs an NVIDIA GPU"):
        feedback.feed(block, torch.zeros(1, 1, 4), torch.eye(32)[None], fmt)
    with pytest.raises(UnsupportedError, match="cuda feedback: needs an NVIDIA GPU"):
        feedback.choose(block, torch.eye(32)[None], (1.0,), fmt)
    with pytest.raises(UnsupportedError, match="cuda feedback: needs an NVIDIA GPU"):
        feedback.descend(block, block, torch.zeros(1, 4), torch.eye(32)[None], torch.ones(1, 32), fmt)


class Inputs:
    """Two matrices of 37 rows, the middle group of three: all parts are views into larger tensors, and one row's norm is 0."""

    def __init__(self, fmt: CodebookFormat) -> None:
        size, draw = fmt.group_size, torch.Generator().manual_seed(fmt.bits)
        x = torch.randn(2, 4 * size, 3 * size, generator=draw) * torch.rand(3 * size, generator=draw)
        known = rounding.prepare(x.mT @ x, size, ["a", "b"])
        some = slice(size, 2 * size)
        self.block = torch.randn(2, 3 * size, 37, generator=draw).cuda()[:, some]
        self.values = torch.randn(2, 3 * size, 37, generator=draw).cuda()[:, some]
        self.norms = torch.rand(3, 2, 37, generator=draw).cuda() * size**0.5
        self.norms[:, 1, 5] = 0
        self.upper, gram = known.upper.cuda()[:, some, some], known.gram.cuda()
        self.gram, self.inverses = gram[:, some, some], 1 / gram.diagonal(dim1=1, dim2=2)[:, some]
        self.left = self.gram @ (self.block - self.values)


def close(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], inputs: int = 1) -> None:
    """The same codes, and the rest to a float's digits, but for rows with a value at a threshold: there all that comes after differs."""
    assert [x.shape for x in a] == [x.shape for x in b]
    rows = (a[0] == b[0]).all(inputs, keepdim=True)
    assert rows.float().mean() > 0.95
    for x, y in zip(a[1:], b[1:], strict=True):
        same = rows.expand_as(x) if x.dim() == rows.dim() else rows.squeeze(inputs)
        torch.testing.assert_close(x[same], y[same], rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_the_codes_are_those_of_torch(fmt: CodebookFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Inputs(fmt)
    fed = feedback.feed(given.block, given.norms, given.upper, fmt)
    chosen = feedback.choose(given.block, given.upper, (1.0, 0.9, 1.1), fmt)
    descended = feedback.descend(given.left, given.values, given.norms[0], given.gram, given.inverses, fmt)
    monkeypatch.setattr(feedback, "refusal", lambda block: "not now")
    close(fed, groups.feed(given.block, given.norms, given.upper, fmt), inputs=0)
    close(chosen, groups.choose(given.block, given.upper, (1.0, 0.9, 1.1), fmt))
    close(descended, groups.descend(given.left, given.values, given.norms[0], given.gram, given.inverses, fmt))


@pytest.mark.gpu
def test_whole_matrices_lose_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, fmt = torch.Generator().manual_seed(0), CodebookFormat(3, 128)
    x = torch.randn(3, 4096, 500, generator=draw) * torch.rand(500, generator=draw)
    weight, gram = torch.randn(3, 200, 500, generator=draw).cuda(), (x.mT @ x).cuda()
    inputs = rounding.prepare(rounding.rotated(gram, fmt), 128, ["a", "b", "c"])
    with_kernel = rounding.encode(weight, fmt, inputs)
    monkeypatch.setattr(feedback, "refusal", lambda block: "not now")
    without = rounding.encode(weight, fmt, inputs)
    torch.testing.assert_close(with_kernel.weighted_errors.sum(), without.weighted_errors.sum(), rtol=1e-3, atol=0)


@pytest.mark.gpu
def test_no_rows_give_no_codes() -> None:
    fmt = CodebookFormat(4, 64)
    block, norms = torch.zeros(2, 64, 0, device="cuda"), torch.zeros(5, 2, 0, device="cuda")
    codes, errors = feedback.feed(block, norms, torch.eye(64, device="cuda").expand(2, 64, 64), fmt)
    assert codes.shape == errors.shape == (64, 5, 2, 0)
