"""Names users import: each leads to its home, lazily, and former names still lead to the new places."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from types import ModuleType

import pytest
from paths import ROOT

import kappaquant


def test_every_public_name_is_the_one_of_its_module() -> None:
    assert set(kappaquant._HOMES) <= set(kappaquant.__all__)
    for name in kappaquant.__all__:
        assert getattr(kappaquant, name) is not None
    for name, home in kappaquant._HOMES.items():
        assert getattr(kappaquant, name) is getattr(import_module(f"kappaquant.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = kappaquant.quantise  # type: ignore[attr-defined]


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, kappaquant; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("former", "home"),
    [
        ("kappaquant.generate", "kappaquant.runtime.generate"),
        ("kappaquant.integrations.mlx", "kappaquant.engines.mlx"),
        ("kappaquant.integrations.vllm", "kappaquant.engines.vllm"),
    ],
)
def test_former_names(former: str, home: str) -> None:
    old, new = import_module(former), import_module(home)
    assert old.__all__
    for name in old.__all__:
        assert getattr(old, name) is getattr(new, name)


def test_plans_have_a_public_module() -> None:
    code = "import kappaquant; print(*(getattr(kappaquant.plan, name).__module__ for name in ('make_plan', 'Plan')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["kappaquant.planning.make", "kappaquant.planning.plan"]
    assert import_module("kappaquant.plan").make_plan is kappaquant.make_plan


def test_vllm_is_pointed_to_what_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from kappaquant.engines.vllm import register

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["kappaquant"].partition(":")
    assert getattr(import_module(module), name) is register
    loaded = ModuleType("kappaquant.engines.vllm.config")  # the real one needs vLLM
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    for _ in range(2):
        assert register() is None
    monkeypatch.setitem(sys.modules, loaded.__name__, None)
    with pytest.raises(ImportError):
        register()
