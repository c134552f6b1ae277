"""JSON documents: read or refused by name, written in one form, whole or not at all. Standard library only."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kappaquant.errors import KappaquantError, OutputError


def read_json(path: Path, error: type[KappaquantError]) -> dict[str, Any]:
    """A JSON object from a file, or ``error`` that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not JSON ({problem})") from None
    if not isinstance(content, dict):
        raise error(f"{path}: a JSON {type(content).__name__} where an object belongs")
    return content


def json_text(content: Mapping[str, Any]) -> str:
    """A document as it is written: strict JSON, with what that has no number for as transformers writes it in config.json."""
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_tagged(content), indent=1, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document of an output that is not finished yet, and so need not be atomic."""
    path.write_text(json_text(content), encoding="utf-8")


def digest(*parts: Any) -> str:
    """SHA-256 (hexadecimal) over JSON values, in the order given."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tagged(value: Any) -> Any:
    """With infinity and NaN as objects, such as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return {key: _tagged(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": json.dumps(value)}
    return value


def check_file(path: Path) -> None:
    """Raise OutputError where a file can not be written at the end of the work that it is for."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: {path.parent} is no folder; create it first")
    if path.is_symlink():
        raise OutputError(f"{path}: is a link, which would be replaced; name the file itself, {os.readlink(path)}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a pipe or a device, which would be replaced; name a file")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync and rename it, so that it is never half there; else OutputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written ({problem.strerror})") from None
