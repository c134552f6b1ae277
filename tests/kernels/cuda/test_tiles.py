"""Tiles hold the bits of the disk, whatever the format, the group size and the shape."""

from __future__ import annotations

import pytest
import torch
from gpu_products import ALL, codes

from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.kernels.cuda import tiles


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_tiles_hold_the_bits_of_the_disk(fmt: GroupedFormat) -> None:
    for shape in ((45, 3 * fmt.group_size - 5), (2, 3, 33, fmt.group_size)):
        packed, norms = codes(fmt, *shape)
        tiled = tiles.tile(packed, norms, fmt)
        back, norms_back = tiles.untile(tiled, fmt, shape[-2], fmt.groups(shape[-1]))
        assert torch.equal(back, packed)
        assert torch.equal(norms_back, norms)


def test_whole_tiles_take_no_more_bytes_than_the_disk() -> None:
    for fmt in ALL:
        packed, norms = codes(fmt, 64, 512)
        tiled = tiles.tile(packed, norms, fmt)
        assert tiled.codes.nbytes + tiled.norms.nbytes == packed.nbytes + norms.nbytes


def test_tiling_in_chunks_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = CodebookFormat(5, 64)
    packed, norms = codes(fmt, 200, 256)
    once = tiles.tile(packed, norms, fmt)
    monkeypatch.setattr(tiles, "_CHUNK", 1)
    assert torch.equal(tiles.tile(packed, norms, fmt).codes, once.codes)
