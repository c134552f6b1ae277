"""One pass through a source's layers: inputs seen, weights rounded for them, and what the rounded layer makes handed to the next."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.checkpoints.writer import Writer
from kappaquant.errors import NonFiniteError, UnsupportedError
from kappaquant.files.processes import in_order
from kappaquant.files.safetensors import Stored, write_at
from kappaquant.files.tensors import read_elements, tensor_bytes
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.moments import Moments
from kappaquant.quantizing.calibration.layers import Layers
from kappaquant.quantizing.calibration.moments import ROUTED, Routed, Sum, watched
from kappaquant.quantizing.calibration.stacks import Stack, Task, matrices_at_once, round_stack
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.rounding.feedback import Rounded
from kappaquant.quantizing.slices import Slice, Sums
from kappaquant.sources.source import Source

logger = logging.getLogger("kappaquant")

_AHEAD = 3  # stacks that wait for each worker's attention: their moments take memory


class Pass:
    """Layer after layer, written as ``writer`` has laid them out.

    Args:
        slices: the pieces of each tensor, by its name, and its shard.
        formats: of the tensors to be packed; others stay as the source has them.
        workers: processes that round, beside a CPU's forward passes; None rounds here.
    """

    def __init__(
        self, source: Source, calibration: Calibration, formats: Mapping[str, Format], writer: Writer[Sums],
        slices: Callable[[str], list[Slice]], device: str, workers: ProcessPoolExecutor | None = None,
    ) -> None:  # fmt: skip
        self._layers = Layers(source, device, torch.float32 if device == "cpu" else torch.bfloat16)
        self._source, self._calibration, self._writer, self._slices = source, calibration, writer, slices
        self._formats = {name: fmt for name, fmt in formats.items() if isinstance(fmt, CodebookFormat)}
        self._workers = workers
        self.fewest: int | None = None
        """Tokens of the routed expert that saw fewest; None where there are no such experts."""

    @torch.no_grad()
    def run(self) -> None:
        """Round what the layers' linear modules and routed experts hold; what is elsewhere is left for others."""
        states = self._layers.embed(self._calibration.windows)
        for number in range(len(self._layers)):
            self._layers.load(number)
            packed = self._packed(number)
            if any(self._left(name) for name in packed):
                with watched({path: self._layers.model.get_submodule(path) for path in set(packed.values())}) as seen:
                    for _ in self._layers.forward(number, states):
                        pass
                for task, errors, energies in self._round(self._tasks(packed, seen[0]), *seen):
                    self._record(task, errors, energies)
            for name in packed:
                self._layers.put(name, self._stored(name))
            states = list(self._layers.forward(number, states))
            self._layers.unload(number)
        if self.fewest is not None:
            logger.warning(
                "calibration: of the routed experts rounded in this run the one that saw fewest tokens saw %d",
                self.fewest,
            )

    def _packed(self, number: int) -> dict[str, str]:
        """Tensor -> path of its module, of a layer's tensors that are to be packed and whose inputs can be seen."""
        found = {}
        for name in self._layers.names(number):
            target = self._layers.places[name].target
            path, _, parameter = target.rpartition(".")
            module = self._layers.model.get_submodule(path)
            linear = isinstance(module, nn.Linear) and parameter == "weight"
            routed = parameter in ROUTED and callable(getattr(module, "act_fn", None))
            if name not in self._formats:
                continue
            if routed and (getattr(module, "is_transposed", False) or getattr(module, "has_bias", False)):
                raise UnsupportedError(
                    f"{name}: experts with transposed matrices or biases are not calibrated; quantize without --calibration"
                )
            if linear or routed:
                found[name] = path
        return found

    def _tasks(self, packed: Mapping[str, str], sums: Mapping[str, Sum]) -> list[Task]:
        """What is to be rounded of a layer. A layer is rounded whole, for what goes together decides the last digits."""
        together: dict[Any, list[str]] = {}
        for name, path in packed.items():
            at, fmt, shape = self._layers.places[name], self._formats[name], self._source.tensors[name].shape
            key: Any = (fmt, id(sums[path])) if path in sums else (fmt, at.target, at.row, shape)
            together.setdefault(key, []).append(name)
        tasks = []
        for names in together.values():
            path, at = packed[names[0]], self._layers.places[names[0]]
            experts = None
            if path not in sums:
                split = [expert for name in names if (expert := self._layers.places[name].expert) is not None]
                experts = split or list(range(self._source.tensors[names[0]].shape[0]))
            tasks.append(Task(names, self._formats[names[0]], path, at.target.rpartition(".")[2], experts))
        return tasks

    def _round(
        self, tasks: list[Task], sums: Mapping[str, Sum], routed: Mapping[str, Routed]
    ) -> Iterator[tuple[Task, Tensor, Tensor]]:
        """Round and write what is in the tasks; each with the squared errors and energies [rows] of its rows."""
        waiting: deque[tuple[Task, slice, bool]] = deque()  # of the stacks that are being rounded

        def stacks() -> Iterator[Stack]:
            for task in tasks:
                weight = torch.cat([self._read(name).flatten() for name in task.names])
                width = self._source.tensors[task.names[0]].shape[-1]
                weight = weight.view(len(task.experts or [0]), -1, width)
                gram = self._grams(task, sums, routed)
                step = matrices_at_once(weight.shape[1], width, self._layers.device)
                for start in range(0, len(weight), step):
                    some = range(start, min(start + step, len(weight)))
                    rows = slice(some.start * weight.shape[1], some.stop * weight.shape[1])
                    waiting.append((task, rows, some.stop == len(weight)))
                    yield Stack(
                        weight[some.start : some.stop].to(self._layers.device), torch.stack([gram(at) for at in some]), task.fmt,
                        [task.label(at) for at in some],
                    )  # fmt: skip

        errors, energies = [], []
        for made in in_order(round_stack, stacks(), self._workers, _AHEAD):
            task, rows, last = waiting.popleft()
            self._write(task, rows, made)
            errors.append(made.squared_errors.flatten())
            energies.append(made.energies.flatten())
            if last:
                yield task, torch.cat(errors), torch.cat(energies)
                errors, energies = [], []

    def _grams(self, task: Task, sums: Mapping[str, Sum], routed: Mapping[str, Routed]) -> Callable[[int], Tensor]:
        """What gives the moments [in, in] for which a matrix of the task is rounded."""
        if task.experts is None:
            return lambda at: sums[task.path].gram
        experts = task.experts
        one, every = routed[task.path].sums(task.projection)

        def gram(at: int) -> Tensor:
            found = one(experts[at])
            self.fewest = found.count if self.fewest is None else min(self.fewest, found.count)
            return found.towards(every)

        return gram

    def _read(self, name: str) -> Tensor:
        weight = self._source.read(name)
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"{name}: holds NaN or infinity, with which no activations can be computed; repair the source, or quantize "
                "without --calibration"
            )
        return weight

    def _write(self, task: Task, rows: slice, made: Rounded) -> None:
        """Put rows of a task where they belong in its tensors' files."""
        begin = 0
        for name in task.names:
            piece = self._slices(name)[0]
            end = begin + math.prod(self._source.tensors[name].shape[:-1])
            first, stop = max(rows.start, begin), min(rows.stop, end)
            if first < stop:
                for suffix, part in made.parts.items():
                    flat = part.flatten(0, 1)[first - rows.start : stop - rows.start]
                    at = (first - begin) * flat.shape[1]
                    write_at(piece.target_path, piece.stored[suffix], at, tensor_bytes(flat))
            begin = end

    def _record(self, task: Task, errors: Tensor, energies: Tensor) -> None:
        """Vouch for the tensors of a task, whose rows lie in their files."""
        begin = 0
        for name in task.names:
            rows = slice(begin, begin + math.prod(self._source.tensors[name].shape[:-1]))
            begin = rows.stop
            make = partial(_sums, self._source.read(name), errors[rows], energies[rows])
            self._writer.fill(self._source.shard_of[name], self._left(name), make, None)

    def _left(self, name: str) -> list[Slice]:
        """The pieces of a tensor that no run has written yet."""
        return [piece for piece in self._slices(name) if (name, piece.start) not in self._writer.found]

    def _stored(self, name: str) -> Tensor:
        """What was written of a tensor, decoded."""
        piece = self._slices(name)[0]
        fmt = self._formats[name]
        parts = {suffix: _read(piece.target_path, stored) for suffix, stored in piece.stored.items()}
        return fmt.decode(parts, piece.source.info.shape[-1])


def _sums(weight: Tensor, errors: Tensor, energies: Tensor, piece: Slice) -> Sums:
    """What ``encode_slice`` says of a slice of a weight, flattened, whose rows lost so much."""
    width = piece.source.info.shape[-1]
    rows = slice(piece.start // width, piece.stop // width)
    moments = Moments.of(weight[piece.start : piece.stop])
    return Sums(moments, errors[rows].double().sum().item(), energies[rows].double().sum().item())


def _read(path: Path, stored: Stored) -> Tensor:
    return read_elements(path, stored, 0, stored.info.numel).view(stored.info.shape)
