"""What the code of a model's classes does with weights: which it reads past their layers, and from which side it multiplies by one."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

_NOT_READING = ("dtype", "device", "shape", "ndim")
_SAME_WAY = ("to", "contiguous", "float", "type_as")
_SETTING_UP = re.compile(r"__init__|_?init_weights|reset_parameters|extra_repr|_?tie_weights|[gs]et_\w+")


@cache
def multiplied_from_right(cls: type, parameter: str) -> bool | None:
    """Whether the code of a class computes x @ w with ``self.parameter``, and not linear(x, w) or w @ x; None where it shows neither."""

    def has(node: ast.AST | None) -> bool:
        """Whether an operand is the matrix as it is, or some experts' share of it, and not its transposition."""
        while not (isinstance(node, ast.Attribute) and node.attr == parameter):
            if isinstance(node, ast.Subscript):
                node = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SAME_WAY:
                node = node.func.value
            else:
                return False
        return True

    for node in (node for method in _methods(cls) for node in ast.walk(method)):
        left: ast.AST | None = None
        right: ast.AST | None = None
        product = ""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            left, right, product = node.left, node.right, "matmul"
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            left, right = node.args[:2]
            product = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if product == "linear" and has(right):
            return False
        if product in ("matmul", "bmm") and (has(left) or has(right)):
            return has(right)
    return None


def called_plainly(module: nn.Module, path: str, read: frozenset[str]) -> bool:
    """Whether nothing reads the weight of a linear layer but its own, usual forward; ``read`` as ``read_past`` gives it."""
    usual = Conv1D.forward if isinstance(module, Conv1D) else nn.Linear.forward
    return type(module).forward is usual and not is_among(path, read)


def read_past(model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Ends of the paths of modules whose ``weight`` other modules of a model read, and of those whose they change."""
    classes: set[Any] = {type(module) for module in model.modules()}
    read: set[str] = set()
    changed: set[str] = set()
    for cls in classes:
        found = _reads(cls)
        read |= found.own | found.ends
        changed |= found.changed
    return frozenset(read), frozenset(changed)


def is_among(path: str, ends: frozenset[str]) -> bool:
    """Whether a path ends in one of these, at a dot."""
    parts = path.split(".")
    return any(".".join(parts[cut:]) in ends for cut in range(len(parts)))


@dataclass(frozen=True)
class _Reads:
    """Whose ``weight`` the code of a class reads: paths from the module itself, and ends of paths of modules that it meets.

    Attributes:
        changed: those among ``ends`` that it writes to.
    """

    own: frozenset[str]
    ends: frozenset[str]
    changed: frozenset[str]


@cache
def _reads(cls: type) -> _Reads:
    """What the methods of a class do with ``self.a.b.weight`` and ``other.a.b.weight``, but for asking its dtype and the like."""
    own: set[str] = set()
    ends: set[str] = set()
    changed: set[str] = set()
    for each in cls.__mro__:
        if each is nn.Module or each.__module__.startswith(("torch.", "transformers.modeling_utils")):
            continue
        for method in _methods(each):
            above = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(method):
                if not isinstance(node, ast.Attribute) or node.attr != "weight":
                    continue
                holder = above.get(id(node))
                then = holder.attr if isinstance(holder, ast.Attribute) else ""
                root, path = _chain(node.value)
                if then in _NOT_READING or not path:
                    continue
                (own if root == "self" else ends).add(path)
                if (
                    then == "data"
                    or (then.endswith("_") and not then.startswith("_"))
                    or isinstance(node.ctx, ast.Store)
                ):
                    changed.add(path)
    return _Reads(frozenset(own), frozenset(ends), frozenset(changed))


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods that a class defines and computes with; none where its source is not to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not _SETTING_UP.fullmatch(node.name):
            yield node


def _chain(node: ast.expr) -> tuple[str, str]:
    """("self", "a.b") of ``self.a.b``; an empty path for what is no such chain."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return (node.id, ".".join(names)) if isinstance(node, ast.Name) else ("", "")
