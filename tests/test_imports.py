"""Imports run one way: the folders of docs/architecture.md in their order, and its rules; lazy imports included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
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


def rules() -> list[str]:
    """The numbered sentences of the document, each on one line."""
    section = DOCUMENT.partition("## Layer rules")[2].partition("\n## ")[0]
    return [
        " ".join(rule.split())
        for rule in re.findall(r"^\d+\. (.*?)(?=^\d+\. |\n\n|\Z)", section, re.MULTILINE | re.DOTALL)
    ]


def places(text: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", text)


def violations(rule: str) -> list[str]:
    """What the package does against one rule, or AssertionError for a sentence that is none of those known here."""
    if rule.startswith("A folder imports only from those before it:"):
        order = places(rule)
        assert sorted(order) == sorted({name.partition(".")[0] for name in FILES} - PUBLIC), (
            "the order names every folder once"
        )
        at = {place: number for number, place in enumerate(order)}
        return [
            f"{name} imports {target}"
            for name, target in arrows()
            if at[name.partition(".")[0]] < at.get(target.partition(".")[0], -1) or target in PUBLIC
        ]
    if rule.startswith("No torch when imported:"):
        return [name for name in FILES if any(within(name, place) for place in places(rule)) and heavy(name)]
    if match := re.fullmatch(r"(.*?) imports? nothing of the package\.", rule):
        return [f"{a} imports {b}" for a, b in arrows() if any(within(a, place) for place in places(match[1]))]
    if match := re.fullmatch(r"`([\w.]+)` imports only (.*)\.", rule):
        allowed = [match[1], *places(match[2])]
        return [
            f"{a} imports {b}" for a, b in arrows() if within(a, match[1]) and not any(within(b, p) for p in allowed)
        ]
    if match := re.fullmatch(r"`([\w.]+)` does not import (.*)\.", rule):
        return [
            f"{a} imports {b}"
            for a, b in arrows()
            if within(a, match[1]) and any(within(b, p) for p in places(match[2]))
        ]
    if rule == "Nothing imports `cli`; nothing but `commands` imports `commands`.":
        return [
            f"{a} imports {b}"
            for a, b in arrows()
            if within(b, "cli") or (within(b, "commands") and not (within(a, "commands") or a == "cli"))
        ]
    match = re.fullmatch(r"Nothing imports (.*)\.", rule)
    assert match, f"docs/architecture.md has a rule that no test reads: {rule}"
    outside = set(places(match[1]))
    return [name for name, tree in TREES.items() if outside & {full.partition(".")[0] for full in imports(tree)}]


PUBLIC = {"__init__", "generate", "integrations", "plan"}  # names that users were told of; they may import anything


def arrows() -> Iterator[tuple[str, str]]:
    """Every import of one module by another, public names aside."""
    for name in FILES:
        if name.partition(".")[0] not in PUBLIC:
            yield from ((name, target) for target in sorted(targets(name)))


def heavy(module: str) -> bool:
    """Whether importing a module imports torch, by itself or through the package's modules."""
    seen, left = {"__init__"}, {module}
    while left:
        name = left.pop()
        tops = {full.partition(".")[0] for full in imports(TREES[name], lazy=False)}
        if tops & {"torch", "transformers", "safetensors"}:
            return True
        seen.add(name)
        left |= targets(name, lazy=False) - seen
    return False


@pytest.mark.parametrize("rule", rules())
def test_layer_rule(rule: str) -> None:
    found = violations(rule)
    assert not found, f"{rule}: {'; '.join(found[:10])}"


def test_the_rules_are_read_and_name_what_is_there() -> None:
    assert len(rules()) == 13
    for rule in rules():
        if "benchmarks" not in rule:
            for place in places(rule):
                assert any(within(name, place) for name in FILES), f"docs/architecture.md names {place}"


def test_a_broken_rule_is_noticed() -> None:
    assert violations("`checkpoints` does not import `planning`.")
    assert violations("`commands` imports only `errors`.")
    assert violations("No torch when imported: `formats.codec`.")
    assert violations("`planning` imports nothing of the package.")
    assert violations("Nothing imports `numpy`.")
    with pytest.raises(AssertionError, match="no test reads"):
        violations("Imports are nice.")


def test_no_folder_imports_one_that_imports_it() -> None:
    edges: dict[str, set[str]] = {}
    for name, target in arrows():
        here, there = name.partition(".")[0], target.partition(".")[0]
        if here != there:
            edges.setdefault(here, set()).add(there)
    list(TopologicalSorter(edges).static_order())  # raises CycleError
