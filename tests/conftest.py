"""Tests marked ``gpu`` need an NVIDIA GPU: pytest -m gpu. Those marked ``slow`` run in continuous integration."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paths import ROOT

# processes that tests start import this tree too, whatever is installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=["here", pytest.param("process", marks=pytest.mark.slow)])
def command(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, here and, in continuous integration, in a process of its own as well."""
    from command_line import run, run_here

    return {"here": run_here, "process": run}[request.param]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source folder with one tensor of each kind, in two shards; tests that need another have their own ``source``."""
    from builders import write_source

    return write_source(tmp_path / "source", shards=2)
