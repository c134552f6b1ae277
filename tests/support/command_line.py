"""The command line in a process of its own, or here, which saves two seconds of imports."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Protocol
from unittest.mock import patch

from transformers.utils import logging as transformers_logging


class Command(Protocol):
    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]: ...


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kappaquant.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same entry point in this process; what it should not let through, an exception, comes through."""
    from kappaquant.cli import main

    command = ["kappaquant", *map(str, arguments)]
    out, err, code = StringIO(), StringIO(), 0
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", command):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
