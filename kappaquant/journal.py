"""An unfinished output: a folder beside the target, a journal of what is safely on disk, and the step that makes it whole.

``<output>.partial/`` holds ``journal.jsonl`` and ``checkpoint/``. The target name appears only by a rename of the complete
``checkpoint/``, so an unfinished output can not be mistaken for a finished one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kappaquant.errors import OutputError


class Partial:
    """The unfinished state of one output folder, locked while this object is open.

    Args:
        output: the folder to be made; it must not exist, or be empty.
        fingerprint: identifies everything that decides the output's bytes; a journal of another one is refused.

    Raises:
        OutputError: output not empty, another run at work, or left-overs of a different run.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.output = output
        self.root = output.parent / f"{output.name}.partial"
        self.folder = self.root / "checkpoint"
        self.records: list[dict[str, Any]] = []
        resumed = self.root.exists()
        try:
            self.root.mkdir(exist_ok=True)
            self._file = (self.root / "journal.jsonl").open("a+b")
        except OSError as problem:
            raise OutputError(f"{self.root}: cannot be created: {problem.strerror}") from problem
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{self.root}: another run is writing here; wait for it or choose another output"
            ) from None
        self._load()
        if self.records and self.records[0] != {"fingerprint": fingerprint}:
            raise OutputError(
                f"{self.root}: left by a run with another source, plan or options; delete it, or repeat that run to resume"
            )
        finished = bool(self.records) and self.records[-1] == {"finished": True}
        if output.exists() and (not output.is_dir() or any(output.iterdir())) and not finished:
            if not resumed:
                self.discard()
            raise OutputError(f"{output}: exists and is not empty; choose another output or remove it")
        self.finished = finished and not self.folder.exists()
        if not self.finished:
            self.folder.mkdir(exist_ok=True)
        if not self.records:
            self.append([{"fingerprint": fingerprint}])

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the line that was being written when the run was killed
            self._file.truncate(len(whole))
        self.records = [json.loads(line) for line in whole.splitlines()]

    @property
    def has_work(self) -> bool:
        """Whether anything but the fingerprint was recorded."""
        return len(self.records) > 1

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records durably. The data they vouch for must have been synced before."""
        records = list(records)
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records += records

    def finish(self) -> None:
        """Sync every file, give the complete checkpoint its name, and remove what is left of this folder."""
        if self.folder.exists():
            for path in sorted(self.folder.rglob("*")):
                _sync(path)
            _sync(self.folder)
            self.append([{"finished": True}])
            if self.output.exists():
                self.output.rmdir()
            self.folder.rename(self.output)
            _sync(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything unfinished."""
        shutil.rmtree(self.root)
        self.close()

    def close(self) -> None:
        """Let go of the lock; the journal stays for a later run."""
        self._file.close()


def reserve(path: Path, header: bytes, size: int) -> bool:
    """Make ``path`` a file of ``size`` bytes that begins with ``header``; False if it already is.

    The disk space is claimed at once, so that a full disk shows before the first weight is encoded.

    Raises:
        OutputError: the disk is full.
    """
    path.touch()
    with path.open("rb+") as file:
        if os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header:
            return False
        file.truncate(0)
        try:
            allocate(file.fileno(), size)
            os.pwrite(file.fileno(), header, 0)
        except OSError as problem:
            file.truncate(0)
            raise OutputError(
                f"{path}: {size / 1e9:.3f} GB do not fit: {problem.strerror}; free space and run again"
            ) from problem
    return True


def allocate(descriptor: int, size: int) -> None:
    """Claim ``size`` bytes of disk for an open file."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS has no such call
        os.ftruncate(descriptor, size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
