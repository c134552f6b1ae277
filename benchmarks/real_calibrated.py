"""Methods that calibrate, in an environment of their own: GPTQ by llm-compressor, and AutoRound.

Their pins clash with the project's, so ``scripts/calibrated_venv.sh`` sets up another environment, and benchmarks/real_gptq.py runs there.
They see the first half of the text, as llama.cpp's importance matrix does. What they made is kept beside the model.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.real_measure import GROUP, Bench, Packed, Variant

PYTHON = ROOT / ".venv-calibrated" / "bin" / "python"
SCRIPT = ROOT / "benchmarks" / "real_gptq.py"
METHODS = {
    "gptq": ("GPTQ", (4, 3, 2), f"llm-compressor GPTQModifier, symmetric, groups of {GROUP}"),
    "autoround": ("AutoRound", (4, 3), f"AutoRound, symmetric, groups of {GROUP}, 200 steps a block (its default)"),
}


def absent(bench: Bench) -> str | None:
    """Why the methods cannot be asked; None if they can."""
    return None if PYTHON.exists() else "not installed: scripts/calibrated_venv.sh sets up its environment"


def variants() -> list[Variant]:
    """Each method at each width."""
    return [
        Variant(
            f"{title} int{bits} g{GROUP}",
            "calibrated peer",
            setting,
            partial(made, method, bits),
            True,
            absent=absent,
            took=partial(seconds, method, bits),
        )
        for method, (title, widths, setting) in METHODS.items()
        for bits in widths
    ]


def made(method: str, bits: int, bench: Bench) -> Packed:
    """What a method made of the model."""
    from safetensors.torch import load_file

    path = output(method, bits, bench)
    nbytes = about(path)["bytes"]
    return {name: (weight, nbytes[name]) for name, weight in load_file(path).items()}


def seconds(method: str, bits: int, bench: Bench) -> float:
    """How long the method took, as its file says."""
    return float(about(output(method, bits, bench))["seconds"])


def output(method: str, bits: int, bench: Bench) -> Path:
    """The file of dequantized weights, made now unless it is there."""
    tokens = json.dumps(bench.halves[0])
    folder = bench.folder.with_name(bench.folder.name + "-calibrated")  # inside, it would pass for a part of the model
    folder.mkdir(exist_ok=True)
    path = folder / f"{method}-{bits}-g{GROUP}-{hashlib.sha256(tokens.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        listed, partial_path = bench.work / "tokens.json", path.with_suffix(".partial")
        listed.write_text(tokens, encoding="utf-8")
        command = [str(part) for part in (PYTHON, SCRIPT, method, bits, GROUP, bench.folder, listed, partial_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{method} with {bits} bits failed:\n{done.stderr[-2000:]}")
        partial_path.rename(path)
    return path


def about(path: Path) -> dict[str, Any]:
    """Bytes of each tensor, seconds and versions, from the file's header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["about"])
    return found
