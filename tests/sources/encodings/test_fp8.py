"""Which weights share a scale, by the shapes of both."""

from __future__ import annotations

import pytest

from kappaquant import SourceError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.sources.encodings.fp8 import ScaledFp8
from kappaquant.sources.encodings.scheme import Scheme

Shape = tuple[int, ...]


def found(codes: Shape, scale: Shape, blocks: tuple[tuple[int, int], ...], dtype: str = "F32") -> ScaledFp8:
    tensors = {"w": TensorInfo("w", "F8_E4M3", codes), "w_scale": TensorInfo("w_scale", dtype, scale)}
    (encoded,) = ScaledFp8.find(tensors, Scheme("fp8", blocks))
    assert encoded.parts == {"codes": "w", "scale": "w_scale"}
    assert encoded.info == TensorInfo("w", "BF16", codes)
    assert isinstance(encoded.encoding, ScaledFp8)
    return encoded.encoding


BLOCKS = ((128, 128),)


@pytest.mark.parametrize(
    ("codes", "scale", "blocks", "kind"),
    [
        ((200, 300), (), (), "per tensor"),
        ((200, 300), (1, 1), (), "per tensor"),
        ((200, 300), (200,), (), "per channel"),
        ((200, 300), (200, 1), BLOCKS, "per channel"),
        ((200, 300), (2, 3), BLOCKS, "blocks of 128x128"),
        ((200, 300), (2, 1, 3, 1), BLOCKS, "blocks of 128x128"),  # ModelOpt's FP8_PB_WO
        ((64, 100), (1, 1), BLOCKS, "blocks of 128x128"),  # one block, cut short
        ((64, 100), (1, 1), ((128, 128), (64, 128)), "blocks of 128x128"),  # either comes to the same
        ((8, 1024), (8,), BLOCKS, "per channel"),
        ((8, 1024), (1, 8), BLOCKS, "blocks of 128x128"),  # as many as rows, but blocks of columns
        ((4, 200, 300), (4,), (), "per matrix"),
        ((4, 200, 300), (4, 1, 1), (), "per matrix"),
        ((4, 200, 300), (1,), (), "per tensor"),
        ((4, 200, 300), (4, 200, 1), (), "per channel"),
        ((4, 200, 300), (4, 2, 3), BLOCKS, "blocks of 128x128"),
        ((7,), (1,), (), "per tensor"),
    ],
)
def test_shapes_tell(codes: Shape, scale: Shape, blocks: tuple[tuple[int, int], ...], kind: str) -> None:
    assert found(codes, scale, blocks).kind == kind


def test_exponents_come_in_groups_of_32() -> None:
    assert found((8, 64), (8, 2), (), "U8").kind == "blocks of 1x32"
    with pytest.raises(SourceError, match="w_scale: has shape"):
        found((8, 64), (8, 2), (), "F32")


@pytest.mark.parametrize(
    ("codes", "scale", "blocks"),
    [
        ((200, 300), (3, 2), BLOCKS),
        ((200, 300), (2, 3), ()),
        ((200, 300), (300,), BLOCKS),
        ((4, 200, 300), (2, 3), BLOCKS),
        ((200, 300), (2, 3), ((128, 128), (100, 100))),  # both fit, and differ
    ],
)
def test_shapes_that_do_not(codes: Shape, scale: Shape, blocks: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(SourceError, match=r"w_scale: has shape .*, which does not fit w of .*and one of them alone"):
        found(codes, scale, blocks)


def test_no_elements() -> None:
    with pytest.raises(SourceError, match=r"w: .* that needs elements"):
        found((0, 300), (1,), ())


def test_blocks_of_two_sizes_in_one_file_are_told_apart() -> None:
    sizes = ((128, 128), (1, 128))
    assert found((200, 300), (2, 3), sizes).block == (128, 128)
    assert found((200, 300), (200, 3), sizes).block == (1, 128)
