"""Imports run one way: the folders of docs/architecture.md in their order, and its rules; lazy imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "kappaquant"
OUTSIDE = ("benchmarks", "reference", "scripts", "tests", "support")


def module_name(path: Path) -> str:
    """``kappaquant/a/b.py`` as "a.b", ``kappaquant/a/__init__.py`` as "a", the package itself as "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Names imported, in full: "kappaquant.formats.codec" for ``from kappaquant.formats import codec``."""
    for node in ast.walk(tree) if lazy else at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, nothing for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from at_import(node)


def inside(names: Iterator[str]) -> set[str]:
    """The package's modules among imported names; "__init__" where a public name is imported from the package itself."""
    found = set()
    for name in names:
        top, _, rest = name.partition(".")
        if top != "kappaquant":
            continue
        while rest and rest not in FILES:
            rest = rest.rpartition(".")[0]
        found.add(rest or "__init__")
    return found


def targets(module: str, *, lazy: bool = True) -> set[str]:
    """Modules of the package that a module imports."""
    return inside(imports(TREES[module], lazy=lazy)) - {module}


def within(module: str, place: str) -> bool:
    """Whether a module is ``place``, or lies in that folder."""
    return module == place or module.startswith(f"{place}.")


def test_imports_at_the_top_form_no_cycle() -> None:
    graph = {name: targets(name, lazy=False) - {"__init__"} for name in FILES if name != "__init__"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_importing_the_package_imports_nothing_heavy() -> None:
    light = ("planning.plan", "planning.sizes", "checkpoints.checkpoint", "checkpoints.tq3_native", "sources.folder")
    code = f"import sys, {', '.join(f'kappaquant.{name}' for name in light)}; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for heavy in ("torch", "transformers", "matplotlib", "safetensors", "huggingface_hub"):
        assert f"'{heavy}'" not in done.stdout


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "from kappaquant.formats import codec\nimport kappaquant.planning.plan\n"
        "def f():\n    from kappaquant.runtime.packed import X\n"
        "if TYPE_CHECKING:\n    from kappaquant.planning.sizes import summary\n"
        "class C:\n    from kappaquant import load\n"
    )
    tree = ast.parse(source)
    everything = {"formats.codec", "planning.plan", "runtime.packed", "planning.sizes", "__init__"}
    assert inside(imports(tree)) == everything
    assert inside(imports(tree, lazy=False)) == {"formats.codec", "planning.plan", "__init__"}
