"""Predictions kept in files: read back as they were, and named where they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kappaquant.errors import FormatError, OutputError
from kappaquant.evaluate.runs.kept import Kept


def test_broken_predictions_are_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", {"text": "a"}, {})
    kept.write(3, {"loss": torch.arange(4.0)})
    assert kept.read(3)["loss"].tolist() == [0, 1, 2, 3]
    assert kept.has(3)
    assert kept.lacks(4)
    path = tmp_path / "kept" / "000003.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FormatError, match=r"000003.npz: cannot be read .*delete it"):
        kept.read(3)
    (tmp_path / "kept" / "about.json").write_text("{}")
    with pytest.raises(FormatError, match=r"about.json: cannot be read; delete"):
        Kept(tmp_path / "kept", {"text": "a"}, {})
    with pytest.raises(OutputError, match="cannot be made"):
        Kept(path / "below", {}, {})
