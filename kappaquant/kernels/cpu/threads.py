"""How many threads the native core takes: torch's number, also while torch itself is kept to one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_numbers: list[int] = []
"""Of the threads of Python's that are inside."""
_own = threading.local()


def count() -> int:
    """Threads of the core's products: as many as torch had in this thread before ``core_only``."""
    return getattr(_own, "number", 0) or torch.get_num_threads()


@contextmanager
def core_only() -> Iterator[None]:
    """Let only the core's products have several threads.

    Threads of torch's look for work for some milliseconds after each operation that they shared, on the processors that the core's then
    have to do without. For operations between products that is more than they gain. Several threads of Python's may be inside at once:
    torch keeps a number for each, and gives a new one that of the thread which was told last.
    """
    if getattr(_own, "number", 0):
        yield
        return
    with _lock:
        number = torch.get_num_threads()
        if number == 1 and _numbers:  # that of a thread which is inside
            number = _numbers[0]
        _numbers.append(number)
        torch.set_num_threads(1)
    _own.number = number
    try:
        yield
    finally:
        _own.number = 0
        with _lock:
            _numbers.remove(number)
            torch.set_num_threads(number)
