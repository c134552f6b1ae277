"""A parameter in files, kept or packed, read whole and by rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kappaquant.errors import FormatError
from kappaquant.files.safetensors import TensorInfo, read_header
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.entry import Entry


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Entry]:
    fmt, weight = CodebookFormat(5, 32), torch.randn(3, 4, 70)
    parts = {f"w{suffix}": part for suffix, part in fmt.encode(weight).parts.items()}
    path = tmp_path / "model.safetensors"
    save_file({"kept": weight.bfloat16(), **parts}, path)
    where = {name: (path, stored) for name, stored in read_header(path).items()}
    return {
        "kept": Entry(where["kept"][1].info, None, {"": where["kept"]}),
        "w": Entry(
            TensorInfo("w", "BF16", (3, 4, 70)), fmt, {suffix: where[f"w{suffix}"] for suffix in fmt.parts((1, 70))}
        ),
    }


def test_rows_are_rows_of_the_whole(entries: dict[str, Entry]) -> None:
    for entry in entries.values():
        whole = entry.read().float()
        assert whole.shape == (3, 4, 70)
        assert entry.rows == 12
        for start, stop in ((0, 12), (5, 9), (11, 12)):
            assert torch.equal(entry.read_rows(start, stop), whole.view(12, 70)[start:stop])


def test_bits_and_bytes(entries: dict[str, Entry]) -> None:
    kept, packed = entries["kept"], entries["w"]
    assert (kept.bits, packed.bits) == (16, 5)
    assert kept.nbytes == 2 * 3 * 4 * 70
    assert packed.fmt is not None
    assert packed.nbytes == packed.fmt.nbytes((3, 4, 70)) == 12 * 3 * (20 + 2)


def test_questions_that_have_no_answer(entries: dict[str, Entry]) -> None:
    with pytest.raises(FormatError, match="w: is quantized to 5 bits; decode it"):
        entries["w"].elements(0, 1)
    with pytest.raises(FormatError, match="kept: is kept as BF16; it has no parts"):
        entries["kept"].read_parts(0, 1)
