"""torch is kept to one thread for a while, and gets its own back, whoever leaves last."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread

import pytest
import torch

from kappaquant.kernels.cpu import threads


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_core_keeps_its_number() -> None:
    assert threads.count() == 3
    with threads.core_only():
        assert (torch.get_num_threads(), threads.count()) == (1, 3)
        with threads.core_only():
            assert (torch.get_num_threads(), threads.count()) == (1, 3)
        assert (torch.get_num_threads(), threads.count()) == (1, 3)
    assert torch.get_num_threads() == threads.count() == 3


def test_an_error_gives_it_back() -> None:
    with pytest.raises(KeyError), threads.core_only():
        raise KeyError
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_several_threads_may_be_inside_and_leave_in_any_order(first_leaves_first: bool) -> None:
    inside, left = Barrier(2, timeout=10), Barrier(2, timeout=10)
    found: list[int] = []

    def other() -> None:
        with threads.core_only():
            found.append(threads.count())
            inside.wait()
            if first_leaves_first:
                left.wait()
        found.extend((threads.count(), torch.get_num_threads()))
        if not first_leaves_first:
            left.wait()

    thread = Thread(target=other)
    with threads.core_only():
        thread.start()  # its own number is that of this one by now
        inside.wait()
        if not first_leaves_first:
            left.wait()
    found.extend((threads.count(), torch.get_num_threads()))
    if first_leaves_first:
        left.wait()
    thread.join()
    assert found == [3] * 5
