"""Several GPUs of a host, a process each: all pass the text through the layer, and share the stacks that are to be rounded.

A forward pass over the text takes seconds where rounding a layer's experts takes ten times as many, so only the rounding is divided.
Every process has the same hidden states, and which of them rounds a stack changes none of its bytes.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from kappaquant.errors import KappaquantError, WorkerError
from kappaquant.files.processes import without_script

T = TypeVar("T")
_PATIENCE = 10  # seconds for a process to end by itself


@dataclass(frozen=True)
class Cards:
    """One of the processes that share the work; by default the only one.

    Attributes:
        rank: 0 leads: it alone records what is done.
        count: of all processes.
        others: of the leader connections to the followers, of a follower that to the leader.
    """

    rank: int = 0
    count: int = 1
    others: list[Connection] = field(default_factory=list)

    def mine(self, number: int) -> bool:
        """Whether this process rounds the stack of this number."""
        return number % self.count == self.rank

    def gather(self, part: T) -> list[T]:
        """The parts of all processes, for the leader; none for a follower, whose part is sent.

        Raises:
            KappaquantError: what a follower raised.
            WorkerError: a follower is gone.
        """
        if self.rank:
            self.others[0].send_bytes(pickle.dumps(part))  # not by shared memory, as torch's tensors would go
            return []
        parts = [part]
        for number, other in enumerate(self.others, 1):
            try:
                received = pickle.loads(other.recv_bytes())
            except EOFError:
                raise WorkerError(
                    f"the process of GPU {number} was killed, perhaps for want of memory; run again to resume, or give one GPU: "
                    "--device cuda:0"
                ) from None
            if isinstance(received, KappaquantError):
                raise received
            parts.append(received)
        return parts

    def meet(self) -> None:
        """Return when the leader is here; followers wait for it. Raises EOFError where it is gone."""
        for other in self.others:
            if self.rank:
                other.recv()
            else:
                other.send(None)


def devices(device: str) -> list[str]:
    """What works on ``device``: all GPUs for "cuda", else the device alone."""
    if device == "cuda" and torch.cuda.device_count() > 1:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [device]


@contextlib.contextmanager
def followed(follow: Callable[..., None], names: Sequence[str], *args: Any) -> Iterator[Cards]:
    """The leader's ``Cards``, while ``follow(cards, device, *args)`` runs in a process for each further device; all end with it."""
    context = get_context("spawn")
    connections, processes = [], []
    try:
        for rank, name in enumerate(names[1:], 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(follow, theirs, rank, len(names), name, args), daemon=True)
            with without_script():
                process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        yield Cards(0, len(names), connections)
    finally:
        for connection in connections:
            connection.close()  # what waits for the leader ends
        for process in processes:
            process.join(_PATIENCE)
            if process.is_alive():
                process.terminate()
                process.join()


def _run(
    follow: Callable[..., None], leader: Connection, rank: int, count: int, device: str, args: tuple[Any, ...]
) -> None:
    """A follower's life: its errors are the leader's to raise, and it ends with the leader."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            follow(Cards(rank, count, [leader]), device, *args)
        except KappaquantError as problem:
            leader.send_bytes(pickle.dumps(problem))
