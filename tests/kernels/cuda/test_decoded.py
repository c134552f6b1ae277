"""Weights decoded on a GPU are the codec's, and products by them too."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, error, gpu, prepared, random
from nvrtc_here import ARCHITECTURES, needs_compiler

from kappaquant.errors import UnsupportedError
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.kernels.cuda import decoded, nvrtc


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    for instance in (
        "decoded<3, 128>",
        "decoded<6, 256>",
        "decoded<5, 32>",
        "decoded<8, 64>",
        "decoded<19, 32>",
        "decoded<18, 256>",
        "decoded<20, 64>",
    ):
        assert nvrtc.compiled("decoded.cu", instance, arch)[0].startswith(b"\x7fELF")


@gpu
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_the_weight_is_the_codecs(fmt: GroupedFormat) -> None:
    for n, k in ((70, 3 * fmt.group_size - 5), (1, fmt.group_size), (129, 1024 + fmt.group_size)):
        weight, expected = prepared(fmt, n, k)
        found = decoded.decode(weight)
        assert found.shape == (n, k)
        assert float((found.double() - expected).norm() / expected.norm()) < 2.5e-3
        assert n < 40 or torch.equal(decoded.decode(weight, 32, 8), found[32:40])


@gpu
@pytest.mark.parametrize(("first", "rows"), [(32, 40), (8, 8), (64, 32)])
def test_rows_that_are_not_there_are_refused(first: int, rows: int) -> None:
    weight, _ = prepared(CodebookFormat(3, 128), 64, 128)
    with pytest.raises(UnsupportedError, match=f"rows {first} to {first + rows} of 64"):
        decoded.decode(weight, first, rows)


@gpu
def test_products_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = CodebookFormat(4, 128)
    weight, expected = prepared(fmt, 300, 640)
    x, bias = random(50, 640).cuda().bfloat16(), random(300, seed=3).cuda().bfloat16()
    whole = decoded.linear(x, weight)
    assert error(whole, x, expected) < 4e-3
    assert torch.equal(decoded.linear(x, weight, bias), whole + bias)
    monkeypatch.setattr(decoded, "_PIECE_BYTES", 2 * 64 * 640)
    assert error(decoded.linear(x, weight), x, expected) < 4e-3
