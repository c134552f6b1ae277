"""Sums by family against sums over all parameters."""

from __future__ import annotations

from pathlib import Path

from builders import quantize, write_source

from kappaquant.checkpoints.contents import families, formats, total


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
    held = {fmt for name in checkpoint.keys() if (fmt := checkpoint.format_of(name))}
    ids = [fmt.id for fmt in sorted(held, key=lambda fmt: (fmt.bits, fmt.id))]
    assert formats(checkpoint, checkpoint.keys()) == [*ids, "kept"]
    assert formats(checkpoint, ["model.norm.weight"]) == ["kept"]
    assert formats(checkpoint, []) == []
