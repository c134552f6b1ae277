"""Sums by family against sums over all parameters."""

from __future__ import annotations

from pathlib import Path

import tiny_checkpoints
import tiny_models
from builders import quantize, write_source

import kappaquant
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
    assert widths(checkpoint, checkpoint.keys()) == ["3", "4", "kept"]
    assert widths(checkpoint, ["model.norm.weight"]) == ["kept"]
    assert widths(checkpoint, []) == []


def test_formats_that_are_no_codebooks_are_named(tmp_path: Path) -> None:
    source = tiny_models.save_tiny("llama", tmp_path / "source")
    formats = {"*q_proj.weight": "t2g128", "*k_proj.weight": "t3g64", "*v_proj.weight": "t3g32", "*o_proj.weight": 6}
    checkpoint = kappaquant.open_checkpoint(tiny_checkpoints.quantize(source, tmp_path / "out", formats))
    found = families(checkpoint)
    assert widths(checkpoint, found["attention q/k/v/o"]) == ["t2g128", "t3g32", "t3g64", "6"]
    assert widths(checkpoint, found["mlp down_proj"]) == ["3"]
