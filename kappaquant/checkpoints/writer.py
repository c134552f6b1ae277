"""The one way that folders of weights are written: laid out, filled piece by piece in place, resumable, atomic.

``quantize``, ``convert``, ``dequantize`` and exports say what a piece is and how it is made; this says where it goes, what a journal
vouches for, and when the folder gets its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.errors import KappaquantError, OutputError
from kappaquant.files.documents import write_json
from kappaquant.files.processes import ItemError, each
from kappaquant.files.safetensors import Stored
from kappaquant.files.tensors import hash_stored
from kappaquant.files.unfinished import Commit, Partial, check_free

COMMIT_SECONDS = 2.0  # how much work a kill may cost; each commit is two fsyncs

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done and how much there is."""


class Piece(Protocol):
    """One piece of work: picklable, and written in place by whoever runs it.

    Attributes:
        tensor, start: which tensor of the output, and which of its pieces; the same in every run.
        nbytes: how much work it counts as.
    """

    @property
    def tensor(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Piece)
R = TypeVar("R")


class Writer(Generic[R]):
    """The unfinished output of one run; a context manager, locked while it is open.

    Attributes:
        finished: an earlier run of the same fingerprint did it all, up to the last step.
        folder: where the output lies until it gets its name.
        found: (tensor, start) -> what making that piece has taught, of this run and of those it resumes.
        layouts: shard -> its layout, as laid out.

    Args:
        output: the folder to be made; it must not exist, or be empty.
        fingerprint: identifies everything that decides the output's bytes.
        inside: a folder that the output must not lie in.
        to_json, from_json: how ``R`` stands in the journal; with None for ``to_json`` there is nothing to keep.
        stage: of ``progress`` while pieces are made.
        keep_refused: what a user's error ends may be worth resuming with other options; else nothing is left of it.

    Raises:
        OutputError: the output is not empty, lies in ``inside`` or nowhere, another run is at work, or left-overs of a different run.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: str,
        *,
        inside: Path | None,
        total: int,
        stage: str,
        progress: Progress,
        to_json: Callable[[R], Any] | None = None,
        from_json: Callable[[Any], R] = lambda value: value,
        keep_refused: bool = False,
    ) -> None:
        check_output(output, inside)
        self._keep_refused = keep_refused
        self.partial = Partial(output, fingerprint)
        self.finished = self.partial.finished
        self.folder = self.partial.folder
        self.found: dict[tuple[str, int], R] = {}
        self.layouts: dict[str, ShardLayout] = {}
        self._total, self.done = total, 0
        self._stage, self._progress = stage, progress
        self._to_json, self._from_json = to_json, from_json

    def __enter__(self) -> Writer[R]:
        self.partial.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused = isinstance(problem, KappaquantError) and not isinstance(problem, OutputError)
        if refused and not self._keep_refused:
            self.partial.discard()
        self.partial.__exit__(kind, problem, trace)

    def lay_out(self, shard: str, layout: ShardLayout, tensors: Iterable[str] = ()) -> None:
        """Reserve a shard, or take it over as an earlier run left it.

        Args:
            tensors: of whose pieces nothing holds any more, if the shard is laid out anew.
        """
        gone = set(tensors)
        self.found = {key: found for key, found in self.found.items() if key[0] not in gone}
        self.layouts[shard] = layout
        for record in self.partial.lay_out(shard, layout.header, layout.size):
            self.found[record["tensor"], record["start"]] = self._from_json(record.get("sums"))

    def missing(self, pieces: Iterable[P]) -> list[P]:
        """Those that are still to be made; the others count as done."""
        wanted = list(pieces)
        left = [piece for piece in wanted if (piece.tensor, piece.start) not in self.found]
        self.advance(sum(piece.nbytes for piece in wanted) - sum(piece.nbytes for piece in left))
        return left

    def fill(
        self, shard: str, pieces: Iterable[P], make: Callable[[P], R], workers: ProcessPoolExecutor | None
    ) -> None:
        """Make pieces of one shard, by workers or here, and journal each once its bytes are on the disk.

        Raises:
            ItemError: for the first piece that failed; those that were made are safe.
        """
        commit = Commit(self.partial, self.folder / shard, COMMIT_SECONDS)
        try:
            for piece, found in each(make, list(pieces), workers):
                self.found[piece.tensor, piece.start] = found
                record: dict[str, Any] = {"shard": shard, "tensor": piece.tensor, "start": piece.start}
                commit.add(record | ({"sums": self._to_json(found)} if self._to_json else {}))
                self.advance(piece.nbytes)
        finally:
            commit.flush()

    def advance(self, nbytes: int) -> None:
        """Count work as done."""
        self.done += nbytes
        self._progress(self._stage, self.done, self._total)

    def report(self, stage: str, done: int, total: int) -> None:
        """Progress of another stage."""
        self._progress(stage, done, total)

    def hashes(self, workers: ProcessPoolExecutor | None) -> dict[str, str]:
        """SHA-256 of every stored tensor, read back from the files."""
        tasks = [(self.folder / shard, s) for shard, layout in self.layouts.items() for s in layout.stored.values()]
        total, done, found = sum(stored.info.nbytes for _, stored in tasks), 0, {}
        try:
            for (_, stored), digest in each(_hash, tasks, workers):
                found[stored.info.name] = digest
                done += stored.info.nbytes
                self._progress("hash", done, total)
        except ItemError as failure:
            raise failure.problem from failure
        return found

    def finish(self, documents: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> None:
        """Copy ``files`` (name -> where it is), write JSON ``documents`` by name; the folder is whole then."""
        for name, path in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.folder / name)
        for name, content in documents.items():
            write_json(self.folder / name, content)

    def name(self) -> None:
        """Give the whole folder its name; what an earlier run finished gets it too."""
        self.partial.finish()


def check_output(output: Path, inside: Path | None) -> None:
    """Raise OutputError for a place where no output may be made."""
    if inside is not None and inside.resolve() in (output.resolve(), *output.resolve().parents):
        raise OutputError(f"{output}: lies in {inside}, which is read; choose another output")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; create it first")
    check_free(output)


def _hash(task: tuple[Path, Stored]) -> str:
    return hash_stored(*task)
