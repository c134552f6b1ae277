"""Files that the published tool made: the small set of the repository, and the whole of it where it lies beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import BUNDLED, GOLDEN
from safetensors.torch import load_file

import kappaquant


@dataclass(frozen=True)
class Published:
    """A set of tq3_native folders, with the model they were made of."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "src"

    def folders(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("*/tq_config.json"))

    def open(self, folder: str) -> kappaquant.Checkpoint:
        return kappaquant.open_checkpoint(self.root / folder, source=self.source)

    def decoded(self, folder: str) -> dict[str, str]:
        """SHA-256 by tensor of what the tool itself decoded, as far as that is known."""
        table = self.root / "decoded.json"
        if table.exists():
            return dict(json.loads(table.read_text(encoding="utf-8")).get(folder, {}))
        tensors = self.root / folder / "expected_f32.dequant"
        return {n: digest(w) for n, w in load_file(tensors).items()} if tensors.exists() else {}


def digest(weight: torch.Tensor) -> str:
    """SHA-256 of a float32 tensor's bytes; a negative zero counts as zero."""
    assert weight.dtype == torch.float32
    return hashlib.sha256((weight + 0.0).contiguous().numpy().astype("<f4").tobytes()).hexdigest()


bundled, beside = Published(BUNDLED), Published(GOLDEN)
_skipped = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the published tool's files are not beside this repository")

each_set = pytest.mark.parametrize(
    "published", [pytest.param(bundled, id="bundled"), pytest.param(beside, id="beside", marks=_skipped)]
)


def each_folder(wanted: Callable[[Published, str], object] = lambda _published, _folder: True) -> Any:
    """Parametrize over (published, folder) of both sets; where the large one is absent, one skipped test says so."""
    cases = [pytest.param(bundled, f, id=f"bundled-{f}") for f in bundled.folders() if wanted(bundled, f)]
    assert cases
    if GOLDEN.is_dir():
        cases += [pytest.param(beside, f, id=f"beside-{f}") for f in beside.folders() if wanted(beside, f)]
    else:
        cases.append(pytest.param(beside, "", id="beside", marks=_skipped))
    return pytest.mark.parametrize(("published", "folder"), cases)
