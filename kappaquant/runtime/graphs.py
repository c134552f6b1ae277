"""One function as one CUDA graph: captured after it has run, replayed with a single launch."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3


class Graph:
    """A captured call of ``step``, which must use only tensors whose addresses stay.

    Args:
        step: runs a few times before it is captured, for libraries to set themselves up.
        restore: undoes what ``step`` did; runs after each of these times.
        beside: a graph never replayed at the same time, which then shares its memory.

    Attributes:
        output: what ``step`` returned; every replay writes it anew.

    Raises:
        RuntimeError: ``step`` waits for the GPU or does what can not be captured; the message says what and where.
    """

    def __init__(
        self, step: Callable[[], Tensor], restore: Callable[[], None], device: torch.device, beside: Graph | None = None
    ) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.device(device):
            try:
                with torch.cuda.stream(stream):
                    _warm_up(step, restore)
                torch.cuda.current_stream(device).wait_stream(stream)
                pool = beside._graph.pool() if beside else None
                with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                    self.output = step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as problem:
                last = traceback.extract_tb(problem.__traceback__)[-1]
                where = f"{Path(last.filename).name}, line {last.lineno}: {last.line}"
                raise RuntimeError(f"{str(problem).partition(chr(10))[0]} ({where})") from problem
            finally:
                torch.cuda.current_stream(device).wait_stream(stream)
            self._graph.instantiate()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self.output

    def kernels(self) -> int | None:
        """Kernels of one replay, copies and fills included; None without the package cuda-bindings."""
        try:
            from cuda.bindings import driver
        except ImportError:
            return None
        graph = driver.CUgraph(self._graph.raw_cuda_graph())
        count = _check(driver.cuGraphGetNodes(graph, 0))[-1]
        nodes = _check(driver.cuGraphGetNodes(graph, count))[0]
        kinds = driver.CUgraphNodeType
        launched = {
            kinds.CU_GRAPH_NODE_TYPE_KERNEL,
            kinds.CU_GRAPH_NODE_TYPE_MEMCPY,
            kinds.CU_GRAPH_NODE_TYPE_MEMSET,
        }
        return sum(_check(driver.cuGraphNodeGetType(node))[0] in launched for node in nodes[:count])


def _warm_up(step: Callable[[], Tensor], restore: Callable[[], None]) -> None:
    """The last time with an error instead of any wait: a capture that fails half-way leaves more to clean up."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        for left in reversed(range(_WARM_UPS)):
            if not left:
                _set_sync_mode("error")
            step()
            restore()
    finally:
        _set_sync_mode(mode)
        restore()


def _set_sync_mode(mode: str | int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise RuntimeError(f"reading a CUDA graph: {result[0]!r}")
    return result[1:]
