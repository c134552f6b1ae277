"""Rules of the repository itself: small rooms, no machine in the text, versions that agree."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kappaquant

ROOT = Path(__file__).parents[1]
LONGEST = 350
LARGEST = 12_000_000  # the reference model; everything else is far below
MACHINE = re.compile(r"(?<![\w.{}$-])/(?:root|home|work|tmp|Users|mnt|data)/[\w.-]+")


def tracked() -> list[Path]:
    """Files of the repository: by git, or in a copy without it, whatever lies outside hidden folders."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone: which files are tracked is not known")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        with contextlib.suppress(UnicodeDecodeError):
            found[path.relative_to(ROOT)] = path.read_text(encoding="utf-8")
    return found


def test_rooms_are_small() -> None:
    rooms = {p: t.count("\n") for p, t in texts().items() if p.suffix in (".py", ".cu", ".cuh")}
    assert len(rooms) > 30
    assert not {str(path): lines for path, lines in rooms.items() if lines > LONGEST}


def test_no_drawers() -> None:
    assert not [p for p in tracked() if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_no_machine_paths_and_nothing_left_for_later() -> None:
    own = Path(__file__).relative_to(ROOT)
    later = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    for path, text in texts().items():
        if path == own or path.name == "tokenizer.json":
            continue
        assert not MACHINE.search(text), f"{path}: {MACHINE.search(text)}"
        assert not later.search(text), f"{path}: {later.search(text)}"


def test_machine_paths_are_recognized() -> None:
    assert MACHINE.search("see /home" + "/someone/model")
    assert MACHINE.search('"/tmp' + '/venv/bin/python"')
    assert not MACHINE.search("docs/home/plan.md and https://example.org/data/x")


def test_no_large_files() -> None:
    assert not {str(p): p.stat().st_size for p in tracked() if p.stat().st_size > LARGEST}


def test_constraints_pin_exact_versions_of_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)]
    names = {normal(pin.partition("==")[0]) for pin in pins}
    assert len(names) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    missing = {normal(re.match(r"[\w.-]+", want).group()) for want in wanted} - names  # type: ignore[union-attr]
    assert not missing


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_versions_agree() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)
    assert newest
    assert newest.group(1) == kappaquant.__version__


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    steps = ["make lint", "make test", "make test-slow", "make test-vllm"]
    assert [line for line in text.splitlines() if line.startswith("make ")] == steps
    recipes = (ROOT / "Makefile").read_text(encoding="utf-8").split("\n\n")
    recipe = {step: next(r for r in recipes if re.search(rf"^{step[5:]}:", r, re.MULTILINE)) for step in steps}
    assert all(call in recipe["make lint"] for call in ("ruff check .", "ruff format --check .", "/mypy"))
    assert recipe["make test"].endswith('$(PYTEST) -m "not slow"')
    assert recipe["make test-slow"].endswith("$(PYTEST) -m slow")
    assert "pytest tests/engines/vllm" in recipe["make test-vllm"]


def test_pytest_alone_hides_no_test() -> None:
    """``pytest -m gpu`` on a machine with a GPU must find all of them, the slow ones too."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert not re.search(r"(^|\s)(-m|-k|--ignore|--deselect)", options["addopts"])
    assert {marker.partition(":")[0] for marker in options["markers"]} == {"gpu", "slow"}


def test_links_in_the_documents_lead_somewhere() -> None:
    for path, text in texts().items():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http"):
                assert (ROOT / path.parent / target).exists(), f"{path}: {target}"


def test_commands_in_the_documents_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kappaquant.cli", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for path, text in texts().items():
        if path.suffix == ".md":
            blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
            for command in re.findall(r"^kappaquant (\w+)", blocks, re.MULTILINE):
                assert re.search(rf"\b{command}\b", done.stdout), f"{path}: kappaquant {command}"
