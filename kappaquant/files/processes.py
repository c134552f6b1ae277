"""Work spread over processes: results as they come, failures with the item that failed, no orphans."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from kappaquant.errors import KappaquantError, PlanError, UnsupportedError, WorkerError

T = TypeVar("T")
R = TypeVar("R")

_SMALL = 256_000_000  # bytes below which starting workers (2 s) costs more than it saves
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# one import of torch for all workers, in a process that has no threads and no CUDA context to be forked with
_METHOD = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
_MOST = 8  # more processes only queue for the disk
_STARTING = threading.Lock()


class ItemError(Exception):
    """What a task raised for one item."""

    def __init__(self, item: Any, problem: KappaquantError) -> None:
        super().__init__(str(problem))
        self.item, self.problem = item, problem


def choose_device(device: str | None) -> str:
    """The device to compute on, CUDA if there is one and none is named. Raises UnsupportedError if it can not be used."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise UnsupportedError(
            f"device {device!r}: can not be used here ({reason}); give cpu, cuda or cuda:N"
        ) from problem
    return device


def choose_jobs(jobs: int | None, nbytes: int) -> int:
    """Processes for this much data: by default one per usable core up to 8, or just this one where little is to be done.

    Raises PlanError for fewer than one.
    """
    if jobs is not None and jobs < 1:
        raise PlanError(f"jobs = {jobs}: must be at least 1")
    if jobs is not None:
        return jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if nbytes < _SMALL else min(_MOST, cores)


def warm_up(source: str | Path, jobs: int | None) -> None:
    """If quantizing ``source`` will take workers, let the process they are forked from import torch while this one does.

    Saves the 1.5 s of that import when called before this process's own; ``pool`` does without it.
    """
    folder = Path(source)
    nbytes = sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder.is_dir() else _SMALL
    if choose_jobs(jobs, nbytes) > 1:
        _serve()


def _serve() -> None:
    if _METHOD == "forkserver":
        forkserver.set_forkserver_preload(["kappaquant.quantizing.slices", "kappaquant.planning.profile"])
        with without_script():
            forkserver.ensure_running()


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """Processes that are started inside do not run the caller's script again.

    Python has them import the main module, so a script that quantizes without ``if __name__ == "__main__"`` would begin anew in each.
    Nothing that they do here is defined in a script; what is defined there does not reach them.
    """
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # of no file
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class Workers(ProcessPoolExecutor):
    """Whose processes, which ``submit`` starts, begin ``without_script``."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        with without_script():
            return super().submit(fn, *args, **kwargs)


def pool(jobs: int) -> contextlib.AbstractContextManager[ProcessPoolExecutor | None]:
    """A pool of processes with one torch thread each; None inside, meaning this process, for one job."""
    if jobs == 1:
        return contextlib.nullcontext()
    _serve()
    return Workers(jobs, mp_context=get_context(_METHOD), initializer=_start)


def each(task: Callable[[T], R], items: Iterable[T], workers: ProcessPoolExecutor | None) -> Iterator[tuple[T, R]]:
    """(item, task(item)) as they finish. Raises ItemError for the first that fails, when no task runs any more."""
    if workers is None:
        for item in items:
            try:
                yield item, task(item)
            except KappaquantError as problem:
                raise ItemError(item, problem) from problem
        return
    futures: dict[Future[R], T] = {workers.submit(task, item): item for item in items}
    try:
        for future in as_completed(futures):
            try:
                yield futures[future], _result(future)
            except WorkerError:
                raise
            except KappaquantError as problem:
                raise ItemError(futures[future], problem) from problem
    finally:
        # a task that already runs may still write: nobody may touch its file before it has ended
        wait([future for future in futures if not future.cancel()])


def in_order(
    task: Callable[[T], R], items: Iterable[T], workers: ProcessPoolExecutor | None, ahead: int
) -> Iterator[R]:
    """task(item) in the items' order; of those to come no more than ``ahead`` are made before they are needed.

    What travels is pickled whole: torch would put tensors into shared memory, of which containers often have 64 MB.

    Raises what the first task that fails raised, when no task runs any more.
    """
    waiting: deque[Future[bytes]] = deque()
    try:
        for item in items:
            if workers is None:
                yield task(item)
                continue
            waiting.append(workers.submit(_pickled, pickle.dumps((task, item))))
            if len(waiting) >= ahead:
                yield pickle.loads(_result(waiting.popleft()))
        while waiting:
            yield pickle.loads(_result(waiting.popleft()))
    finally:
        wait([future for future in waiting if not future.cancel()])


def _pickled(call: bytes) -> bytes:
    task, item = pickle.loads(call)
    return pickle.dumps(task(item))


def _result(future: Future[R]) -> R:
    try:
        return future.result()
    except BrokenProcessPool as problem:
        raise WorkerError(
            "a worker process was killed, perhaps for want of memory; run again with fewer --jobs to resume"
        ) from problem


def _start() -> None:
    """One thread of its own, memory that stays mapped, and an end with the parent, however that one ends."""
    import torch

    torch.set_num_threads(1)
    # glibc hands freed blocks back and faults them in again: 10 % of the time at effort fast
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(option, 1 << 28)
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
