"""The import table of docs/architecture.md holds, lazy imports included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kappaquant"
OUTSIDE = ("benchmarks", "reference", "scripts", "tests", "tiny_models")


def module_name(path: Path) -> str:
    """``kappaquant/a/b.py`` as "a.b", ``kappaquant/a/__init__.py`` as "a", the package itself as "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Names imported, in full: "kappaquant.ops" for ``from kappaquant import ops``."""
    for node in ast.walk(tree) if lazy else at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module
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
    """The package's modules among imported names; "__init__" where only a public name is imported."""
    found = set()
    for name in names:
        top, _, rest = name.partition(".")
        if top == "kappaquant" and rest in FILES:
            found.add(rest)
        elif top == "kappaquant" and rest.rpartition(".")[0] not in FILES:
            found.add("__init__")
    return found


def targets(path: Path, *, lazy: bool = True) -> set[str]:
    """Modules of the package that a file imports, without the package root that any import passes through."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [name for name in imports(tree, lazy=lazy) if name != "kappaquant"]
    plain = any(
        isinstance(node, ast.Import) and any(alias.name == "kappaquant" for alias in node.names)
        for node in (ast.walk(tree) if lazy else at_import(tree))
    )
    return inside(iter(names)) | ({"__init__"} if plain else set())


def table() -> dict[str, tuple[str, list[str]]]:
    """Module or pattern -> (its job, what it may import) from the document."""
    rows = {}
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"\| `([\w.*]+)` \| (.*) \| ?(.*) ?\|", line)
        if match:
            name, job, allowed = match.groups()
            rows[name] = job, [allowed.strip()] if "anything" in allowed else re.findall(r"`([\w.*]+)`", allowed)
    return rows


TABLE = table()


def row(module: str) -> str | None:
    """The table's row for a module: its own, or the pattern that fits."""
    if module in TABLE:
        return module
    return next((name for name in TABLE if "*" in name and fnmatchcase(module, name)), None)


def allowed(module: str, target: str) -> bool:
    name = row(module)
    assert name is not None
    rules = TABLE[name][1]
    if target == "errors" or rules == ["anything"]:
        return True
    if rules == ["anything but `cli`"]:
        return target != "cli"
    return any(fnmatchcase(target, rule) or fnmatchcase(target, f"{rule}.*") for rule in rules)


@pytest.mark.parametrize("module", [name for name in FILES if name != "kernels"])
def test_a_module_imports_what_its_row_allows(module: str) -> None:
    assert row(module), f"docs/architecture.md has no row for {module}"
    forbidden = [target for target in targets(FILES[module]) if not allowed(module, target)]
    assert not forbidden, f"{module} imports {forbidden}; docs/architecture.md does not allow it"


def test_every_row_is_a_module_and_so_is_all_it_allows() -> None:
    patterns = [*TABLE, *(rule for _, rules in TABLE.values() for rule in rules if not rule.startswith("anything"))]
    assert len(TABLE) > 25
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in FILES), f"docs/architecture.md names {pattern}"


def test_rules_that_no_row_may_lift() -> None:
    for module, path in FILES.items():
        found = targets(path)
        assert "cli" not in found, f"{module} imports cli"
        if module.startswith("evaluate"):
            assert not [t for t in found if t.startswith(("kernels", "ops"))]
        if module.startswith("kernels."):
            above = {t for t in found if not t.startswith("kernels")} - {"format", "errors", "codec", "blocks"}
            assert not above, f"{module} imports {above}"
        tops = {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not tops.intersection(OUTSIDE), f"{module} imports {tops.intersection(OUTSIDE)}"


def test_modules_without_torch() -> None:
    for name, (job, _) in TABLE.items():
        if "no torch" in job or name in ("errors", "__init__", "cli"):
            tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
            tops = {imported.partition(".")[0] for imported in imports(tree, lazy=name != "cli")}
            assert not tops & {"torch", "transformers", "safetensors"}, name


def test_imports_at_the_top_form_no_cycle() -> None:
    graph = {name: targets(path, lazy=False) - {"__init__"} for name, path in FILES.items() if name != "__init__"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, kappaquant.legacy, kappaquant.plan, kappaquant.sizes; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for light in ("plan", "checkpoint", "legacy", "source"):
        assert f"'kappaquant.{light}'" in done.stdout
    for heavy in ("torch", "transformers", "matplotlib", "safetensors", "huggingface_hub"):
        assert f"'{heavy}'" not in done.stdout


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "from kappaquant import codec\nimport kappaquant.plan\n"
        "def f():\n    from kappaquant.nn import X\n"
        "if TYPE_CHECKING:\n    from kappaquant.sizes import summary\n"
        "class C:\n    from kappaquant import load\n"
    )
    tree = ast.parse(source)
    names = (name for name in imports(tree) if name != "kappaquant")
    assert inside(names) == {"codec", "plan", "nn", "sizes", "__init__"}
    names = (name for name in imports(tree, lazy=False) if name != "kappaquant")
    assert inside(names) == {"codec", "plan", "__init__"}
    assert not allowed("format", "codec")
    assert not allowed("evaluate.tasks", "kernels.torch_reference")
    assert not allowed("integrations.quantizer", "integrations.transformers")
    assert not allowed("__init__", "cli")
