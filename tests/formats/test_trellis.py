"""Trellis formats as docs/format.md defines them: a decoder written from that page alone, sizes, ids, settings, levels."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from kappaquant.errors import FormatError, PlanError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.registry import format_by_id
from kappaquant.formats.signs import GROUP_SIZES, signs
from kappaquant.formats.transposed import Transposed
from kappaquant.formats.trellis import TRELLIS_BITS, TRELLIS_FORMATS, TrellisFormat, gaussian_levels

EACH = pytest.mark.parametrize("fmt", TRELLIS_FORMATS.values(), ids=str)


def by_the_book(packed: bytes, norm: float, bits: int, size: int, levels: list[float]) -> list[float]:
    """A group's weights, from docs/format.md alone; floats of Python's are float64."""
    planes = [[packed[plane * size // 8 + i // 8] >> i % 8 & 1 for i in range(size)] for plane in range(bits)]
    u = planes[0]
    values = []
    for i in range(size):
        p = u[(i - 2) % size] ^ u[(i - 4) % size] ^ u[(i - 5) % size]
        q = u[i] ^ u[(i - 1) % size] ^ u[(i - 6) % size]
        r = sum(planes[k][i] << k - 1 for k in range(1, bits))
        values.append(levels[4 * r + 2 * q + p])
    s1, s2 = signs(size)
    values = [s * value for s, value in zip(s2, values, strict=True)]
    h = 1
    while h < size:
        for start in range(0, size, 2 * h):
            for i in range(start, start + h):
                values[i], values[i + h] = values[i] + values[i + h], values[i] - values[i + h]
        h *= 2
    return [norm * s * value / math.sqrt(size) for s, value in zip(s1, values, strict=True)]


@EACH
def test_any_bytes_decode_as_the_document_says(fmt: TrellisFormat) -> None:
    draws = np.random.default_rng(0)
    shape = (3, 2 * fmt.group_size - 5)
    packed = draws.integers(0, 256, fmt.packed_shape(shape), dtype=np.uint8)
    norms = draws.uniform(0.5, 2, fmt.norms_shape(shape)).astype(np.float16)
    parts = {".tq_packed": torch.from_numpy(packed), ".tq_norms": torch.from_numpy(norms)}
    decoded = fmt.decode(parts, shape[1])
    size, each = fmt.group_size, fmt.bytes_per_group
    for row in range(3):
        expected = [
            by_the_book(packed[row, g * each : (g + 1) * each].tobytes(), float(norms[row, g]), fmt.bits, size, list(fmt.codebook))
            for g in range(2)
        ]  # fmt: skip
        torch.testing.assert_close(
            decoded[row].double(), torch.tensor(expected).double().flatten()[: shape[1]], atol=1e-5, rtol=1e-5
        )
    x = torch.randn(2, shape[1])
    rotated = fmt.rotate(x) @ fmt.decode_rotated(parts, shape[1]).T
    torch.testing.assert_close(rotated, x @ decoded.T, atol=1e-4, rtol=1e-4)


@EACH
def test_it_takes_the_bytes_of_the_codebook_format(fmt: TrellisFormat) -> None:
    for shape in ((3, 5), (2, 64, 700)):
        assert fmt.parts(shape) == CodebookFormat(fmt.bits, fmt.group_size).parts(shape)
    size = fmt.group_size
    assert fmt.columns(size, 3 * size) == CodebookFormat(fmt.bits, size).columns(size, 3 * size)


@EACH
def test_levels_are_symmetric_and_scale_with_the_group(fmt: TrellisFormat) -> None:
    assert len(fmt.codebook) == 2 ** (fmt.bits + 1)
    assert list(fmt.codebook) == sorted(fmt.codebook) == [-level for level in reversed(fmt.codebook)]
    assert fmt.codebook == pytest.approx(
        [level * math.sqrt(32 / fmt.group_size) for level in gaussian_levels(fmt.bits, 32)]
    )


def test_an_id_is_one_format() -> None:
    fmt = format_by_id("t3g128", "w")
    assert fmt == TrellisFormat(3, 128)
    assert (fmt.bits, fmt.code_bits, fmt.step, fmt.rotation) == (3, 3, 128, CodebookFormat(3, 128).rotation)
    assert pickle.loads(pickle.dumps(fmt)) == fmt != TrellisFormat(3, 64)
    assert format_by_id("t3g128t", "w") == Transposed(fmt)
    assert fmt.restored(fmt.settings()) == fmt
    other = TrellisFormat(3, 128, tuple(2 * level for level in fmt.codebook), "F32")
    assert fmt.restored(other.settings()) == other != fmt
    for settings in ({}, {"codebook": list(fmt.codebook[1:])}, {"codebook": list(CodebookFormat(3, 128).codebook)}):
        with pytest.raises(ValueError, match="no codebook of 16 ascending values for t3g128"):
            fmt.restored(settings)


@pytest.mark.parametrize("bits", [1, 5, 16, True])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(PlanError, match="a trellis code has 2, 3, 4 bits"):
        TrellisFormat(bits, 128)
    with pytest.raises(FormatError, match=f"unknown format id 't{int(bits)}g128'"):
        format_by_id(f"t{int(bits)}g128", "w")


@pytest.mark.parametrize("size", [0, 16, 96])
def test_other_groups_are_refused(size: int) -> None:
    with pytest.raises(PlanError, match=f"group size {size}: the Hadamard rotation needs a power of two"):
        TrellisFormat(3, size)


def test_all_groups_have_all_widths() -> None:
    assert list(TRELLIS_FORMATS) == [f"t{bits}g{size}" for bits in TRELLIS_BITS for size in GROUP_SIZES]
