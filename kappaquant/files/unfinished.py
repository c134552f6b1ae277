"""An unfinished output: a folder beside the target, a journal of what is safely on disk, and the step that makes it whole.

``<output>.partial/`` holds ``journal.jsonl`` and ``checkpoint/``. The target name appears only by a rename of the complete
``checkpoint/``, so an unfinished output can not be mistaken for a finished one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from kappaquant.errors import KappaquantError, OutputError

_TAKEN = "{}: exists and is not empty; choose another output or remove it"


class Partial:
    """The unfinished state of one output folder, locked while this object is open; a context manager.

    Leaving the context with a user's error or a full disk removes everything, unless there is work worth resuming.

    Args:
        output: the folder to be made; it must not exist, or be empty.
        fingerprint: identifies everything that decides the output's bytes; a journal of another one is refused.

    Raises:
        OutputError: output not empty or a mount point, another run at work, or left-overs of a different run.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.output = output = output.resolve()
        self.root = _root(output)
        self.folder = self.root / "checkpoint"
        self.journal = self.root / "journal.jsonl"
        self.records: list[dict[str, Any]] = []
        if output.is_mount():
            raise OutputError(f"{output}: is a mount point, which no rename can fill; choose a folder inside it")
        if not self.journal.exists() and _occupied(self.root):
            raise OutputError(
                f"{self.root}: is in the way, and no unfinished run left it; move it or choose another output"
            )
        resumed = self.root.exists()
        try:
            self.root.mkdir(exist_ok=True)
            self._file = self.journal.open("a+b", buffering=0)
        except OSError as problem:
            raise OutputError(f"{self.root}: cannot be created: {problem.strerror}") from problem
        try:
            self._claim(fingerprint, resumed)
        except BaseException:
            self.close()
            raise

    def _claim(self, fingerprint: str, resumed: bool) -> None:
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
        renamed = bool(self.records) and self.records[-1] == {"finished": True} and not self.folder.exists()
        self.finished = renamed and _occupied(self.output)  # else it was removed since, and is made again
        if _occupied(self.output) and not self.finished:
            if not resumed:
                self.discard()
            raise OutputError(_TAKEN.format(self.output))
        if not self.finished:
            self.folder.mkdir(exist_ok=True)
        if not self.records:
            self.append([{"fingerprint": fingerprint}])

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
        if (full or isinstance(problem, KappaquantError)) and not self.has_work:
            self.discard()
        self.close()
        if full:
            raise OutputError(f"{self.output}: the disk is full; free space and run again to resume") from problem

    def lay_out(self, shard: str, header: bytes, size: int) -> list[dict[str, Any]]:
        """Reserve a shard of the output, or find it as an earlier run left it; what the journal says of the work done in it."""
        path = self.folder / shard
        if not is_reserved(path, header, size):
            self.append([{"reserved": shard}])  # voids what the journal says of this shard so far
            reserve(path, header, size)
            return []
        done: list[dict[str, Any]] = []
        for record in self.records:
            if record.get("reserved") == shard:
                done = []
            elif record.get("shard") == shard:
                done.append(record)
        return done

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the line that was being written when the run was killed
            self._file.truncate(len(whole))
        try:
            self.records = [json.loads(line) for line in whole.splitlines()]
        except ValueError as problem:
            raise OutputError(f"{self.journal}: corrupted ({problem}); delete {self.root} and start again") from None

    @property
    def has_work(self) -> bool:
        """Whether a finished piece of a tensor was recorded."""
        return any("tensor" in record for record in self.records)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records durably. The data they vouch for must have been synced before."""
        records = list(records)
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
        data = memoryview("".join(lines).encode())
        while data:  # unbuffered, so that closing has nothing to write to a full disk
            data = data[self._file.write(data) :]
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
        """Remove everything unfinished, the journal last: what is left of a killed removal is still recognized."""
        if not self.root.exists():
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.journal.unlink(missing_ok=True)
        if not any(self.root.iterdir()):
            self.root.rmdir()
        self.close()

    def close(self) -> None:
        """Let go of the lock; the journal stays for a later run."""
        self._file.close()


class Commit:
    """Groups records of finished work on one file: sync its data, then say so in the journal, every so many seconds."""

    def __init__(self, partial: Partial, target: Path, seconds: float) -> None:
        self.partial, self.target, self.seconds = partial, target, seconds
        self.pending: list[dict[str, Any]] = []
        self.last = time.monotonic()

    def add(self, record: dict[str, Any]) -> None:
        self.pending.append(record)
        if time.monotonic() - self.last > self.seconds:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            with self.target.open("rb+") as file:
                os.fsync(file.fileno())
            self.partial.append(self.pending)
        self.pending, self.last = [], time.monotonic()


def check_free(output: Path) -> None:
    """Raise OutputError if something is in the place of a folder to be made, and no unfinished run that it may be the end of."""
    if _occupied(output) and not output.is_mount() and not _root(output.resolve()).exists():
        raise OutputError(_TAKEN.format(output))


def _root(output: Path) -> Path:
    return output.parent / f"{output.name}.partial"


def _occupied(path: Path) -> bool:
    """Whether something is there that is not an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def is_reserved(path: Path, header: bytes, size: int) -> bool:
    """Whether ``path`` is what ``reserve`` makes."""
    if not path.exists() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def reserve(path: Path, header: bytes, size: int) -> None:
    """Make ``path`` a file of ``size`` bytes that begins with ``header``; the rest is void.

    The disk space is claimed at once, so that a full disk shows before the first weight is encoded.

    Raises:
        OutputError: the disk is full.
    """
    with path.open("wb") as file:
        try:
            allocate(file.fileno(), size)
            os.pwrite(file.fileno(), header, 0)
        except OSError as problem:
            file.truncate(0)
            raise OutputError(
                f"{path}: {size / 1e9:.3f} GB do not fit: {problem.strerror}; free space and run again"
            ) from problem


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
