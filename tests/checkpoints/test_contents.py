"""Sums by family against sums over all parameters."""

from __future__ import annotations

from pathlib import Path

from builders import quantize, write_source

from kappaquant.checkpoints.contents import families, total, widths


def test_families_part_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = quantize(write_source(tmp_path / "source"), tmp_path / "out", "recipe")
    found = families(checkpoint)
    assert sorted(name for names in found.values() for name in names) == checkpoint.keys()
    assert len(found) > 3
    sums = [total(checkpoint, names) for names in found.values()]
    assert [s.output_bytes for s in sums] == sorted((s.output_bytes for s in sums), reverse=True)
    whole = total(checkpoint, checkpoint.keys())
    assert whole.tensors == len(checkpoint.keys())
    assert whole.output_bytes == sum(checkpoint.nbytes(name) for name in checkpoint.keys())
    for part in ("tensors", "params", "source_bytes", "output_bytes"):
        assert sum(getattr(s, part) for s in sums) == getattr(whole, part)
    assert widths(checkpoint, checkpoint.keys()) == sorted({checkpoint.bits(name) for name in checkpoint.keys()})
    assert widths(checkpoint, ["model.norm.weight"]) == [16]
    assert widths(checkpoint, []) == []
