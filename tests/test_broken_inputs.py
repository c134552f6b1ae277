"""Every command over models and checkpoints that are broken in every way we know: it ends with 2 and one line, and no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from broken import BOTH, CHECKPOINTS, SOURCES, Break
from command_line import run
from ends_well import good_places, said

ON_SOURCES = {
    "scan": "scan {x} --bits 3", "plan": "plan {x} --bits 3", "quantize": "quantize {x} -o {out} --bits 3 --effort fast --jobs 1",
    "export": "export {x} -o {out} --bits 4", "calibrate": "calibrate {x} -o {file} --data-free", "write": "write {x} -o {file}l --tokens 2",
    "evaluate": "evaluate {checkpoint} --against {x} --text {text} --window 16 --tokens 20",
    "bench": "bench {checkpoint} --against {x} --context 4 --steps 1",
}  # fmt: skip
ON_CHECKPOINTS = {
    "inspect": "inspect {x}", "verify": "verify {x}", "dequantize": "dequantize {x} -o {out}", "export": "export {x} -o {out}",
    "generate": "generate {x} two --max-new-tokens 2", "chat": "chat {x} --max-new-tokens 2",
    "bench": "bench {x} --context 4 --steps 1", "evaluate": "evaluate {x} --against {source} --text {text} --window 16 --tokens 20",
    "compare": "compare {x}", "card": "card {x} -o {file}", "push": "push {x} someone/name", "convert": "convert {x} -o {out}",
    "serve": "serve {x} --engine transformers", "write": "write {x} -o {file}l --tokens 2",
}  # fmt: skip
LOADING = ("generate", "chat")
# which commands must not pass over a fault; the others may have no eye for it
MUST = (
    dict.fromkeys(BOTH, ("scan", "plan", "quantize", "export", "calibrate"))
    | {
        "weights with NaN": ("quantize",),
        "hidden_size is a word": ("export", "write"),
        "hidden_size is another": ("export", "write"),
        "heads are none": ("export", "write"),
        "layers are negative": ("export", "write"),
        "tensors are missing": ("export", "write", "bench"),
        "a tensor too many": ("export", "write", "bench"),
        "a tensor of another shape": ("export", "write"),
        "no tokenizer": ("write",),
        "tokenizer is no JSON": ("write",),
        "only pickles": ("plan", "quantize"),
        "an adapter": ("plan", "quantize"),
    },
    dict.fromkeys(BOTH, ("inspect", "verify", "dequantize", "generate"))
    | {
        "manifest is no JSON": ("inspect", "generate"), "manifest of nothing": ("inspect",), "map of numbers": ("inspect", "generate"),
        "map of a format nobody knows": ("inspect", "generate"), "norms are missing": ("verify", "generate"), "codes of another shape": ("generate",),
        "hidden_size is a word": LOADING, "heads are none": LOADING, "model_type is unknown": LOADING, "no tokenizer": LOADING,
        "tokenizer is no JSON": LOADING, "chat template is broken": ("chat",), "chat template raises": ("chat",),
        "chat template reads what is not there": ("chat",), "generation_config is no JSON": LOADING, "generation_config of words": LOADING,
        "evaluation is no JSON": ("compare", "card", "push"), "evaluation of nothing": ("compare", "card", "push"),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_places(tmp_path_factory.mktemp("good"))


def faults(kind: int, own: dict[str, Break]) -> list[Any]:
    return [pytest.param(change, MUST[kind].get(fault, ()), id=fault) for fault, change in {**BOTH, **own}.items()]


def check(
    kind: str,
    change: Break,
    commands: dict[str, str],
    must: tuple[str, ...],
    good: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
) -> None:
    broken = shutil.copytree(good / kind, tmp_path / "broken")
    change(broken)
    places = {name: good / name for name in ("source", "checkpoint")} | {"text": good / "text.txt", "x": broken}
    places |= {"out": tmp_path / "out", "file": tmp_path / "file.json"}
    for name, command in commands.items():
        found = said(command, places, patch)
        assert found or name not in must, f"{name} passes over it"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for made in tmp_path.glob("file.json*"):
            made.unlink()


@pytest.mark.parametrize(("change", "must"), faults(0, SOURCES))
def test_models(
    change: Break, must: tuple[str, ...], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {name: line for name, line in ON_SOURCES.items() if name in must or name in ("scan", "plan", "quantize")}
    check("source", change, commands, must, good, tmp_path, monkeypatch)


@pytest.mark.parametrize(("change", "must"), faults(1, CHECKPOINTS))
def test_checkpoints(
    change: Break, must: tuple[str, ...], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {
        name: line
        for name, line in ON_CHECKPOINTS.items()
        if name in must or name in ("inspect", "verify", "card", "convert")
    }
    check("checkpoint", change, commands, must, good, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [("source", c) for c in (BOTH | SOURCES).values()] + [("checkpoint", c) for c in (BOTH | CHECKPOINTS).values()],
)
def test_every_command(kind: str, change: Break, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, change, ON_SOURCES if kind == "source" else ON_CHECKPOINTS, (), good, tmp_path, monkeypatch)


@pytest.mark.parametrize("fault", ["config.json is no JSON", "weights are a pipe"])
def test_a_process_of_its_own(fault: str, good: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(good / "source", tmp_path / "broken")
    BOTH[fault](broken)
    done = run("quantize", broken, "-o", tmp_path / "out", "--bits", "3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
