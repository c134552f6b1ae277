"""What the tests of fused layers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import packed_families

from kappaquant.kernels.cpu.step import Stack, Stepper


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed checkpoints by family."""
    return packed_families(tmp_path_factory.mktemp("fused"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every layer's step of the native core."""
    taken: list[int] = []
    one, several = Stepper.mlp_, Stepper.layers

    def counted(self: Stepper, x: torch.Tensor, layer: Any) -> torch.Tensor:
        taken.append(len(x))
        return one(self, x, layer)

    def all_counted(self: Stepper, x: torch.Tensor, stack: Stack, *rest: Any) -> torch.Tensor | None:
        found = several(self, x, stack, *rest)
        taken.extend([len(x)] * len(stack.layers) if found is not None else [])
        return found

    monkeypatch.setattr(Stepper, "mlp_", counted)
    monkeypatch.setattr(Stepper, "layers", all_counted)
    return taken
