"""Fused layers against the modules they stand in for, from one and the same cache; on a GPU only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

import kappaquant
from kappaquant.runtime.decoding import Decoder
from kappaquant.runtime.fused import qwen3_5 as fused

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def load(folder: Path, device: str, architecture: str = "qwen3_5_moe_text", **plan: Any) -> Any:
    source = kappaquant.open_source(save_tiny(architecture, folder / "source", dtype=torch.bfloat16))
    options = plan or {"policy": "recipe", "recipe": "apex2"}
    kappaquant.quantize(source, folder / "out", kappaquant.make_plan(source.tensors, source.config, **options))
    return kappaquant.load(folder / "out", device=device)[0]


def test_layers_that_can_not_be_fused_stay_and_say_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(tmp_path, "cpu")
    with caplog.at_level(logging.WARNING, "kappaquant"):
        assert fused.fuse(model) == []
    assert "model.layers.0 and 1 more: not fused: its experts do not run on tensor cores" in caplog.text
    assert fused.fuse(torch.nn.Linear(2, 2)) == []


PLANS: dict[str, dict[str, Any]] = {
    "apex2": {},
    "apex3": {"policy": "recipe", "recipe": "apex3"},
    "uniform 3": {"policy": "uniform", "bits": 3},
    "uniform 6": {"policy": "uniform", "bits": 6},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("architecture", ["qwen3_5_moe_text", "qwen3_5_moe"])
@pytest.mark.parametrize("plan", PLANS)
class TestOnGpu:
    pytestmark = gpu

    def test_steps_match_the_modules(self, plan: str, architecture: str, batch: int, tmp_path: Path) -> None:
        model = load(tmp_path, "cuda", architecture, **PLANS[plan])
        tokens = torch.randint(3, 80, (batch, 30), device="cuda")
        mask = torch.ones(batch, 6, dtype=torch.int64)
        if batch > 1:
            mask[1, :2] = 0
        runs = []
        assert len(fused.fuse(model)) == 2
        for fuse in (True, False):
            if not fuse:
                for layer in model.modules():
                    if isinstance(vars(layer).get("forward"), fused.FusedLayer):
                        del layer.forward
            decoder = Decoder(model, batch, 64, graph=False)
            logits = [decoder.prefill(tokens[:, :6], mask)]
            logits += [decoder.step(tokens[:, i]) for i in range(6, 30)]
            runs.append(torch.stack(logits).float())
        error = (runs[0] - runs[1]).norm(dim=-1) / runs[0].norm(dim=-1)
        assert torch.equal(runs[0][0], runs[1][0])  # prompts take the same way
        assert float(error.median()) < 0.03, error.flatten().tolist()  # bf16 roundings, and routers that they tip over

    def test_a_graph_gives_the_same_tokens(self, plan: str, architecture: str, batch: int, tmp_path: Path) -> None:
        model = load(tmp_path, "cuda", architecture, **PLANS[plan])
        assert any(isinstance(vars(layer).get("forward"), fused.FusedLayer) for layer in model.modules())
        prompt = torch.randint(3, 80, (batch, 5), device="cuda")
        answers = []
        for graph in (False, True):
            decoder = Decoder(model, batch, 128, graph=graph)
            token, answer = decoder.prefill(prompt).argmax(-1), []
            for _ in range(100):
                answer.append(token)
                token = decoder.step(token).argmax(-1)
            assert decoder.graphed == graph
            answers.append(torch.stack(answer))
        assert torch.equal(*answers)
