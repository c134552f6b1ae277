"""How many threads the native core takes: torch's number, also while torch itself is kept to one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_number = 0


def count() -> int:
    """Threads of the core's products: as many as torch had before ``core_only``."""
    return _number or torch.get_num_threads()


@contextmanager
def core_only() -> Iterator[None]:
    """Let only the core's products have several threads.

    Threads of torch's look for work for some milliseconds after each operation that they shared, on the processors that the core's then
    have to do without. For operations between products that is more than they gain. Several threads may be inside at once.
    """
    global _inside, _number
    with _lock:
        _inside += 1
        if _inside == 1:
            _number = torch.get_num_threads()
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_number)
                _number = 0
