"""The formats' constants against where they come from: the generator that drew the signs, the published numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from published import Published, each_set

from kappaquant.errors import FormatError, PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import BITS, FORMATS, CodebookFormat, float32, published_codebook
from kappaquant.formats.registry import format_by_id
from kappaquant.formats.signs import GROUP_SIZES, signs


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_signs_are_the_first_draws_of_a_mersenne_twister(group: int) -> None:
    twister = np.random.MT19937()
    twister._legacy_seeding(42)
    draws = [2 * int(value & 1) - 1 for value in twister.random_raw(2 * group)]
    assert signs(group) == (tuple(draws[:group]), tuple(draws[group:]))
    generator = torch.Generator("cpu").manual_seed(42)
    drawn = [tuple((2 * torch.randint(0, 2, (group,), generator=generator) - 1).tolist()) for _ in range(2)]
    assert signs(group) == tuple(drawn)


def test_signs_as_the_specification_prints_them() -> None:
    printed = [sum((s == 1) << i for i, s in enumerate(half)).to_bytes(16, "little").hex() for half in signs(128)]
    assert printed == ["2242d73f177cab01f6ba4affe75f6b65", "07d021a85ce6402438d201c5cbbf2514"]


@each_set
def test_constants_are_those_published(published: Published) -> None:
    constants = json.loads((published.root / "constants.json").read_text(encoding="utf-8"))
    for group, theirs in constants["d"].items():
        written = tuple("".join("-+"[s == 1] for s in half) for half in signs(int(group)))
        assert written == (theirs["signs1"], theirs["signs2"])
        for bits, centroids in theirs["centroids_f32_hex"].items():
            ours = [float32(c) for c in published_codebook(int(bits), int(group))]
            assert ours == [float.fromhex(c) for c in centroids]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.id)
def test_codebooks_are_symmetric_ascending_float32(fmt: CodebookFormat) -> None:
    book = fmt.codebook
    assert len(book) == 2**fmt.bits
    assert list(book) == sorted(set(book))
    assert book == tuple(-c for c in reversed(book))
    assert all(float(np.float32(c)) == c for c in book)


def test_known_centroids_of_a_gaussian() -> None:
    # Max, "Quantizing for Minimum Distortion", 1960, table I
    assert [c * 8 for c in CodebookFormat(2, 64).codebook[2:]] == pytest.approx([0.4528, 1.510], abs=1e-3)
    assert [c * 8 for c in CodebookFormat(3, 64).codebook[4:]] == pytest.approx(
        [0.2451, 0.7560, 1.344, 2.152], abs=1e-3
    )


def test_sizes() -> None:
    fmt = CodebookFormat(3, 128)
    assert (fmt.id, fmt.bytes_per_group, fmt.groups(1), fmt.groups(128), fmt.groups(129)) == ("tq3g128", 48, 1, 1, 2)
    assert fmt.packed_shape((4, 5, 300)) == (4, 5, 144)
    assert fmt.norms_shape((4, 5, 300)) == (4, 5, 3)
    assert fmt.nbytes((4, 5, 300)) == 4 * 5 * (144 + 6)
    assert len(FORMATS) == len(BITS) * len(GROUP_SIZES)
    assert TensorInfo("x", "BF16", ()).nbytes == 2
    assert TensorInfo("x", "F32", (3, 0)).nbytes == 0
    assert all(f.bytes_per_group == math.ceil(f.bits * f.group_size / 8) for f in FORMATS.values())


def test_what_is_no_format() -> None:
    with pytest.raises(PlanError, match="bits = 9"):
        CodebookFormat(9, 128)
    with pytest.raises(PlanError, match="group size 48"):
        CodebookFormat(3, 48)
    with pytest.raises(FormatError, match=r"lm_head: unknown format id 'trellis3'"):
        format_by_id("trellis3", "lm_head")
    with pytest.raises(FormatError, match="7 bits at group size 128"):
        published_codebook(7, 128)
