"""Cells of tiles: whatever decode.cuh makes of a lane's words is what the codec says, on a CPU, where the same source runs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda_on_host
import numpy as np
import pytest
import torch
from gpu_products import ALL, INT8_NAMES, NAMES, codes, named
from other_trellises import Few

from kappaquant.formats import codec
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.kernels.cuda import tables, tiles
from kappaquant.kernels.cuda.cells import cells, unfit

_WORD = ctypes.c_uint32


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    text = (Path(__file__).parents[2] / "support" / "decode_on_host.cpp").read_text()
    return cuda_on_host.library(tmp_path_factory.mktemp("decode"), text, cuda_on_host.HEADERS)


@cuda_on_host.needs_host_compiler
@pytest.mark.parametrize("half", [False, True], ids=["int8", "float16"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("name", INT8_NAMES)
def test_lanes_decode_what_the_codec_does(decoder: ctypes.CDLL, name: str, group: int, half: bool) -> None:
    fmt = named(name, group)
    kind, inputs = cells(fmt), 2 * max(group, tiles.INPUTS)
    packed, norms = codes(fmt, tiles.ROWS, inputs)
    truth = codec.centroids(fmt, packed.device)[codec.indices(packed, fmt).int()]
    # [unit, lane, word], plane after plane for four rows
    words = tiles.tile(packed, norms, fmt).codes[0].transpose(1, 2).flatten(2).numpy().astype(np.int64) & 0xFFFFFFFF
    order = tiles._order(group, packed.device).view(4, 32)
    entries, scale = (tables.half_table if half else tables.int8_table)(kind)
    table, out = (_WORD * 8)(*entries), (_WORD * 16)()
    bits, first = fmt.bits, kind.planes[0].words
    for unit in range(inputs // tiles.INPUTS):
        for lane in range(32):
            r, t = divmod(lane, 4)
            before = words[unit ^ 1 if group == 256 and t == 0 else unit, 4 * r + (t + 3) % 4]
            for row in range(4):
                mine = [*words[unit, lane][row * first :][:first], *words[unit, lane][4 * first + row :: 4]]
                path = int(before[4 * (bits - 1) + row])
                assert not decoder.decode_row(
                    kind.number, group, half, (_WORD * bits)(*map(int, mine[:bits])), _WORD(path), table, out
                )
                found = np.frombuffer(out, np.float16 if half else np.int8)[:32].astype(np.float64)
                if kind.has_signs and not half:
                    found += 0.5
                wanted = truth[r + 8 * row, unit * tiles.INPUTS + order[t]].numpy()
                assert np.abs(found * scale - wanted).max() < (5e-4 if half else 7e-3) * max(fmt.codebook)


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.id)
def test_cells_give_the_indices_again(fmt: GroupedFormat) -> None:
    packed, _ = codes(fmt, 5, 3 * fmt.group_size)
    indices = codec.indices(packed, fmt)
    made = cells(fmt).of(indices)
    assert int(made.max()) < 2**fmt.bits
    assert torch.equal(cells(fmt).indices(made), indices)


def test_every_format_has_a_number() -> None:
    assert len({cells(named(name)).number for name in NAMES}) == len(NAMES)
    assert len({cells(fmt).number for fmt in ALL}) == len(NAMES)  # not by group


def test_another_trellis_is_refused() -> None:
    assert unfit(named("t3")) is None
    assert "takes the trellis" in str(unfit(Few(3, 128)))
