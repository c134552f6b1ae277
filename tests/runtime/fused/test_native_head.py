"""The head by the native core, where it is kept in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

import kappaquant
from kappaquant.kernels.cpu.library import absence
from kappaquant.kernels.cpu.step import Stepper


@pytest.mark.skipif(bool(absence()), reason=absence())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_tokens_are_multiplied_by_the_core(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = kappaquant.open_source(save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16))
    plan = kappaquant.make_plan(source.tensors, source.config, bits=4, overrides=[("lm_head.weight", 16)])
    kappaquant.quantize(source, tmp_path / "out", plan)
    model = kappaquant.load(tmp_path / "out", dtype=dtype)[0]
    taken: list[int] = []
    own = Stepper.apply

    def counted(self: Stepper, x: torch.Tensor, matrix: Any) -> torch.Tensor:
        taken.append(len(x))
        return own(self, x, matrix)

    monkeypatch.setattr(Stepper, "apply", counted)
    head = model.lm_head
    with torch.no_grad():
        for shape in ((1, 1, 128), (8, 1, 128), (128,), (2, 3, 128), (9, 1, 128), (0, 128)):
            x = torch.randn(shape).to(dtype)
            torch.testing.assert_close(head(x), torch.nn.functional.linear(x, head.weight), rtol=0.02, atol=0.02)
    assert taken == [1, 8, 1, 6]
    assert head(torch.randn(1, 128).to(dtype)).requires_grad  # nothing stands between it and gradients
    assert len(taken) == 4
