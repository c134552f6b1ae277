"""The environment says what products multiply by under vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = "from kappaquant.engines.vllm import activations; activations.check_chosen(); print(activations.CHOSEN)"


@pytest.mark.parametrize(("said", "chosen"), [({}, "int8"), ({"KAPPAQUANT_ACTIVATIONS": "float32"}, "float32")])
def test_what_is_said_is_chosen(said: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAPPAQUANT_ACTIVATIONS", raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == chosen


def test_what_no_kernel_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAPPAQUANT_ACTIVATIONS", "int4")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert "KAPPAQUANT_ACTIVATIONS=int4: must be one of int8, bf16, float32" in done.stderr
