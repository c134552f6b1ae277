"""Each module has tests of its name in the same folder, or a line in tested_elsewhere.md that says which tests are its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

PACKAGE, TESTS = ROOT / "kappaquant", ROOT / "tests"
LIST = TESTS / "tested_elsewhere.md"
LINE = re.compile(r"- `([\w/]+)`: (tests/[\w/]+\.py)(?:, (by|through) (`[\w/]+`(?:, `[\w/]+`)*))?")


class Line(NamedTuple):
    module: str
    test: str
    how: str | None
    names: tuple[str, ...]


def modules(package: Path) -> dict[str, Path]:
    """Modules as "folder/name"; an __init__.py only if it does more than import and list names."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py" or has_code(path):
            found[path.relative_to(package).with_suffix("").as_posix()] = path
    return found


def has_code(path: Path) -> bool:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if not (docstring or names or isinstance(node, (ast.Import, ast.ImportFrom))):
            return True
    return False


def own_test(module: str) -> str:
    folder, _, name = f"tests/{module}".rpartition("/")
    return f"{folder}/test_{name}.py"


def lines(text: str) -> list[Line]:
    found = []
    for line in text.splitlines():
        if line.startswith("- "):
            match = LINE.fullmatch(line)
            assert match, f"{LIST.name}: {line!r} is not of the form - `module`: tests/file.py, by `name`, `name`"
            found.append(Line(match[1], match[2], match[3], tuple(re.findall(r"`([\w/]+)`", match[4] or ""))))
    return found


def dotted(module: str) -> str:
    return ".".join(["kappaquant", *(part for part in module.split("/") if part != "__init__")])


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it, those it gives to import_module included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def defined(path: Path) -> set[str]:
    """Names that a module itself defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def problems(root: Path, text: str) -> list[str]:
    """What is wrong between the package, its tests and the list, one line for each."""
    found, known, listed = [], modules(root / "kappaquant"), lines(text)
    for module in known:
        times = sum(line.module == module for line in listed)
        own = (root / own_test(module)).exists()
        if not own and not times:
            found.append(f"{module}: has neither {own_test(module)} nor a line in {LIST.name}")
        if own and times:
            found.append(f"{module}: has {own_test(module)}, so its line in {LIST.name} must go")
        if times > 1:
            found.append(f"{module}: has {times} lines in {LIST.name}")
    for line in listed:
        if line.module not in known:
            found.append(f"{line.module}: in {LIST.name}, but there is no such module")
        elif not (root / line.test).exists():
            found.append(f"{line.module}: {line.test} does not exist")
        elif problem := not_tested(root, line, known):
            found.append(f"{line.module}: {problem}")
    return found


def not_tested(root: Path, line: Line, known: dict[str, Path]) -> str | None:
    """Why the file of a line is not seen to use the module, or None."""
    test = root / line.test
    if line.how == "by":
        content, own = test.read_text(encoding="utf-8"), defined(known[line.module])
        strange = [n for n in line.names if n not in own or not re.search(rf"\b{n}\b", content)]
        return f"{strange[0]} is not a name of it that occurs in {line.test}" if strange else None
    file = test
    for module in (*line.names, line.module):
        if dotted(module) not in imported(file):
            return f"{file.relative_to(root).as_posix()} does not import {module}"
        if module not in known and not (root / "kappaquant" / f"{module}.py").exists():
            return f"there is no module {module}"
        file = root / "kappaquant" / f"{module}.py"
    return None


def test_each_module_is_tested_where_one_looks() -> None:
    assert len(modules(PACKAGE)) > 50
    found = problems(ROOT, LIST.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_the_list_is_sorted() -> None:
    names = [line.module for line in lines(LIST.read_text(encoding="utf-8"))]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- `a/one`: tests/test_all.py", None),
        ("- `a/one`: tests/test_all.py, by `run`, `LIMIT`", None),
        ("", "a/one: has neither tests/a/test_one.py nor a line"),
        ("- `a/one`: tests/test_gone.py", "tests/test_gone.py does not exist"),
        ("- `a/one`: tests/a/test_two.py", "tests/a/test_two.py does not import a/one"),
        ("- `a/one`: tests/a/test_two.py, through `a/two`", "tests/a/test_two.py does not import a/two"),
        ("- `a/one`: tests/test_all.py, through `a/two`", "kappaquant/a/two.py does not import a/one"),
        ("- `a/one`: tests/test_all.py, through `a/__init__`", None),
        ("- `a/one`: tests/test_all.py, by `walk`", "walk is not a name of it"),
        ("- `a/one`: tests/test_all.py, by `hidden`", "hidden is not a name of it that occurs in tests/test_all.py"),
        ("- `a/one`: tests/test_all.py\n- `a/two`: tests/test_all.py", "a/two: has tests/a/test_two.py, so its line"),
        ("- `a/one`: tests/test_all.py\n- `a/three`: tests/test_all.py", "a/three: in tested_elsewhere.md, but there"),
        ("- `a/one`: tests/test_all.py\n- `a/one`: tests/test_all.py", "a/one: has 2 lines"),
    ],
)
def test_what_the_list_must_not_say(text: str, problem: str | None, tmp_path: Path) -> None:
    for name, content in {
        "kappaquant/a/__init__.py": '"""Only names."""\nfrom kappaquant.a.one import run\n__all__ = ["run"]\n',
        "kappaquant/a/one.py": "LIMIT = 3\ndef run(): ...\ndef hidden(): ...\n",
        "kappaquant/a/two.py": "",
        "tests/a/test_two.py": "one = 1\n",
        "tests/test_all.py": "from kappaquant.a import one, two\none.run(one.LIMIT)\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = problems(tmp_path, text)
    assert found == [] if problem is None else len(found) == 1 and problem in found[0], found
