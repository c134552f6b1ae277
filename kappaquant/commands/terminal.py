"""What the commands print, and where."""

from __future__ import annotations

import sys
from typing import Any


def show(content: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(content if content.endswith("\n") else content + "\n")
    else:
        console().print(content)


def emit(pieces: Any) -> str:
    """Print pieces of text as they come; returns the whole."""
    whole = []
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        whole.append(piece)
    sys.stdout.write("\n")
    return "".join(whole)


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    narrow = stderr or sys.stdout.isatty()  # in a pipe or file nothing needs to be squeezed
    return Console(stderr=stderr, width=None if narrow else 140)


def errors() -> Any:
    return console(stderr=True)


def progress(title: str, unit: str | None = None) -> Any:
    from kappaquant.commands.tables import ProgressBar

    return ProgressBar(title, errors(), unit)
