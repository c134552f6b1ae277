"""Machine code kept between processes: a machine compiles a kernel once, not at every start."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger("kappaquant")


def folder() -> Path:
    """Where it is kept; may be deleted at any time."""
    return Path.home() / ".cache" / "kappaquant" / "cubins"


def kept(inputs: Iterable[str], make: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """(machine code, mangled name) of a kernel: from the disk, or else by ``make``, to be found there the next time.

    Args:
        inputs: all that the code depends on: sources, options, compiler.
    """
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    try:
        path = folder() / digest
        content = path.read_bytes()
        checksum, name, code = content[:32], *content[32:].split(b"\0", 1)
        if hashlib.sha256(content[32:]).digest() == checksum:
            return code, name
        logger.warning("%s is damaged; the kernel is compiled again", path)
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as problem:  # no home folder, no right to read, or cut short
        logger.debug("no kept kernel: %s", problem)
    code, name = make()
    try:
        _write(folder() / digest, name.rstrip(b"\0") + b"\0" + code)
    except (OSError, RuntimeError) as problem:
        logger.debug("a compiled kernel can not be kept: %s", problem)
    return code, name


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
