"""What transformers makes of a checkpoint: with kappaquant the model, without it an error, never random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import kappaquant

LOAD = """
import sys
{first}
from transformers import {auto}
model = {auto}.from_pretrained(sys.argv[1])
print("kappaquant" in sys.modules, getattr(model.config, "transformers_weights", None), len(list(model.parameters())) > 0)
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    source = kappaquant.open_source(save_tiny("qwen3", folder / "source"))
    plan = kappaquant.make_plan(source.tensors, source.config, bits=4)
    return kappaquant.quantize(source, folder / "out", plan)


def loaded(folder: Path, auto: str, first: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD.format(auto=auto, first=first), folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
def test_without_kappaquant_transformers_stops_and_says_what_to_import(quantized: Path, auto: str) -> None:
    done = loaded(quantized, auto)
    assert done.returncode == 1
    assert "import-kappaquant-first" in done.stderr.splitlines()[-1]


def test_with_kappaquant_it_loads_and_forgets_the_key(quantized: Path) -> None:
    done = loaded(quantized, "AutoModelForCausalLM", "import kappaquant")
    assert done.stdout == "True None True\n", done.stderr


def test_a_checkpoint_has_the_config_of_its_source_and_no_key(quantized: Path) -> None:
    written = json.loads((quantized / "config.json").read_text())
    assert written["transformers_weights"] == "import-kappaquant-first.safetensors"
    checkpoint = kappaquant.open_checkpoint(quantized)
    assert "transformers_weights" not in checkpoint.config
    del written["transformers_weights"]
    (quantized / "config.json").write_text(json.dumps(written))  # as older versions wrote it
    model, _ = kappaquant.load(quantized)
    assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())
