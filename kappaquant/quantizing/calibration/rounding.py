"""One pass through a source's layers: inputs seen, weights rounded for them, and what the rounded layer makes handed to the next."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from kappaquant.checkpoints.writer import Writer
from kappaquant.files.processes import in_order
from kappaquant.files.safetensors import Stored, write_at
from kappaquant.files.tensors import read_elements, tensor_bytes
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.planning.moments import Moments
from kappaquant.quantizing.calibration.cards import Cards, devices, followed
from kappaquant.quantizing.calibration.layers import Layers
from kappaquant.quantizing.calibration.moments import Routed, Sum, watched
from kappaquant.quantizing.calibration.stacks import Stack, matrices_at_once, round_stack
from kappaquant.quantizing.calibration.tasks import Seen, Task, moments_of, packable, tasks_of
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.rounding.feedback import Rounded
from kappaquant.quantizing.slices import Slice, Sums
from kappaquant.sources.source import Source

logger = logging.getLogger("kappaquant")


@dataclass(frozen=True)
class Work:
    """What a pass is about; picklable, of a source that lies in a folder.

    Attributes:
        formats: of the tensors to be packed; others stay as the source has them.
        slices: the pieces of a tensor, by its name.
        found: (tensor, start) of the pieces that earlier runs have written.
    """

    source: Source
    calibration: Calibration
    formats: Mapping[str, Format]
    slices: Callable[[str], list[Slice]]
    found: frozenset[tuple[str, int]]


Finish = Callable[[str], None]
"""Told of a shard of which no layer to come needs anything."""


@dataclass(frozen=True)
class Loss:
    """Squared errors and energies [rows] of some rows of a layer's task."""

    task: int
    rows: slice
    errors: Tensor
    energies: Tensor


def calibrate(
    work: Work, writer: Writer[Sums], device: str, workers: ProcessPoolExecutor | None, jobs: int, finish: Finish
) -> None:
    """Round what lies in decoder layers, on all GPUs for "cuda", and write it as ``writer`` has laid it out.

    Args:
        workers: ``jobs`` processes that round, beside a CPU's forward passes; None rounds in this one.
    """
    # a streamed source has one shard at a time, which processes would take from each other
    names = devices(device) if work.source.folder else [device]
    with followed(follow, names, work) as cards:
        Pass(work, names[0], cards, workers, jobs + 1).run(writer, finish)


def follow(cards: Cards, device: str, work: Work) -> None:
    """The same pass on another device, whose bytes the leader records."""
    Pass(work, device, cards).run(None, lambda shard: None)


class Pass:
    """Layer after layer, on one device.

    Args:
        ahead: stacks that are made before workers can take them; their moments take memory.
    """

    def __init__(
        self, work: Work, device: str, cards: Cards, workers: ProcessPoolExecutor | None = None, ahead: int = 1
    ) -> None:
        self._layers = Layers(work.source, device, torch.float32 if device == "cpu" else torch.bfloat16)
        self._work, self._source, self._cards = work, work.source, cards
        self._workers, self._ahead = workers, ahead
        self._formats = {name: fmt for name, fmt in work.formats.items() if isinstance(fmt, GroupedFormat)}
        self._moments: dict[tuple[str, int], Moments] = {}  # of the slices of a layer, by tensor and start
        self._fewest: int | None = None  # tokens of the routed expert that saw fewest

    @torch.no_grad()
    def run(self, writer: Writer[Sums] | None, finish: Finish) -> None:
        """Round what the layers' linear modules and routed experts hold; what is elsewhere is left for others.

        Args:
            writer: vouches for what was written; None for a follower.
        """
        shards = self._source.shard_of
        needed = {shards[name]: number for number in range(len(self._layers)) for name in self._layers.names(number)}
        states, calls = self._layers.embed(self._work.calibration.windows)
        for number in range(len(self._layers)):
            self._layers.load(number)
            packed = packable(self._layers, self._formats, number)
            if any(self._left(name) for name in packed):
                with watched({path: self._layers.model.get_submodule(path) for path in set(packed.values())}) as seen:
                    for _ in self._layers.forward(number, states, calls):
                        pass
                tasks = tasks_of(self._layers, self._formats, packed, seen[0])
                gathered = self._cards.gather((list(self._round(tasks, *seen)), self._fewest))
                self._cards.meet()  # all have written: anyone may read the layer
                if writer:
                    self._record(tasks, [loss for losses, _ in gathered for loss in losses], writer)
                    self._fewest = min((fewest for _, fewest in gathered if fewest is not None), default=None)
            for name in packed:
                self._layers.put(name, self._stored(name))
            states = list(self._layers.forward(number, states, calls))
            self._layers.unload(number)
            for shard in [shard for shard, last in needed.items() if last == number]:
                finish(shard)
        if writer and self._fewest is not None:
            logger.warning(
                "calibration: of the routed experts rounded in this run the one that saw fewest tokens saw %d",
                self._fewest,
            )

    def _round(self, tasks: list[Task], sums: Mapping[str, Sum], routed: Mapping[str, Routed]) -> Iterator[Loss]:
        """Round and write those of the tasks' stacks that are this process's."""
        waiting: deque[tuple[int, slice]] = deque()  # of the stacks that are being rounded

        def stacks() -> Iterator[Stack]:
            numbers = count()
            for number, task in enumerate(tasks):
                tensors = [self._read(name) for name in task.names]
                weight = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # no copy of a layer's experts
                width = self._source.tensors[task.names[0]].shape[-1]
                weight = weight.view(len(task.experts or [0]), -1, width)
                moments = moments_of(task, sums, routed)
                step = matrices_at_once(weight.shape[1], width, self._layers.device)
                for start in range(0, len(weight), step):
                    if not self._cards.mine(next(numbers)):
                        continue
                    some = range(start, min(start + step, len(weight)))
                    waiting.append((number, slice(some.start * weight.shape[1], some.stop * weight.shape[1])))
                    seen = [moments(at) for at in some]
                    self._note(task, seen)
                    yield Stack(
                        weight[some.start : some.stop].to(self._layers.device, copy=True),  # a view would travel with all it views
                        torch.stack([found.drawn for found in seen]), task.fmt, [task.label(at) for at in some],
                    )  # fmt: skip

        for made in in_order(round_stack, stacks(), self._workers, self._ahead):
            number, rows = waiting.popleft()
            self._write(tasks[number], rows, made)
            yield Loss(number, rows, made.squared_errors.flatten(), made.energies.flatten())

    def _note(self, task: Task, seen: list[Seen]) -> None:
        """Remember the routed expert that saw fewest tokens."""
        if task.experts is not None:
            counts = [found.own.count for found in seen]
            self._fewest = min(counts if self._fewest is None else [self._fewest, *counts])

    def _read(self, name: str) -> Tensor:
        """A tensor on the device, flat; its slices' moments are kept for the record."""
        weight = self._source.read(name).to(self._layers.device)
        self._moments |= {
            (name, piece.start): Moments.of(weight[piece.start : piece.stop]) for piece in self._work.slices(name)
        }
        return weight

    def _write(self, task: Task, rows: slice, made: Rounded) -> None:
        """Put rows of a task where they belong in its tensors' files."""
        begin = 0
        for name in task.names:
            piece = self._work.slices(name)[0]
            end = begin + math.prod(self._source.tensors[name].shape[:-1])
            first, stop = max(rows.start, begin), min(rows.stop, end)
            if first < stop:
                for suffix, part in made.parts.items():
                    flat = part.flatten(0, 1)[first - rows.start : stop - rows.start]
                    at = (first - begin) * flat.shape[1]
                    write_at(piece.target_path, piece.stored[suffix], at, tensor_bytes(flat))
            begin = end

    def _record(self, tasks: list[Task], losses: list[Loss], writer: Writer[Sums]) -> None:
        """Vouch for the tensors of a layer, whose rows lie in their files."""
        lost: dict[str, tuple[Tensor, Tensor]] = {}
        for number, task in enumerate(tasks):
            mine = sorted((loss for loss in losses if loss.task == number), key=lambda loss: loss.rows.start)
            errors, energies = (torch.cat([getattr(loss, key) for loss in mine]) for key in ("errors", "energies"))
            begin = 0
            for name in task.names:
                rows = slice(begin, begin + math.prod(self._source.tensors[name].shape[:-1]))
                begin = rows.stop
                lost[name] = errors[rows], energies[rows]

        def sums(piece: Slice) -> Sums:
            width = piece.source.info.shape[-1]
            rows = slice(piece.start // width, piece.stop // width)
            error, energy = (each[rows].double().sum().item() for each in lost[piece.tensor])
            return Sums(self._moments[piece.tensor, piece.start], error, energy)

        by_shard: dict[str, list[Slice]] = {}
        for name in lost:
            by_shard.setdefault(self._source.shard_of[name], []).extend(self._left(name))
        for shard, pieces in by_shard.items():
            writer.fill(shard, pieces, sums, None)
        self._moments.clear()

    def _left(self, name: str) -> list[Slice]:
        """The pieces of a tensor that no earlier run has written."""
        return [piece for piece in self._work.slices(name) if (name, piece.start) not in self._work.found]

    def _stored(self, name: str) -> Tensor:
        """What was written of a tensor, decoded on the device."""
        piece = self._work.slices(name)[0]
        fmt = self._formats[name]
        parts = {suffix: self._on_disk(piece.target_path, stored) for suffix, stored in piece.stored.items()}
        return fmt.decode(parts, piece.source.info.shape[-1])

    def _on_disk(self, path: Path, stored: Stored) -> Tensor:
        return read_elements(path, stored, 0, stored.info.numel).view(stored.info.shape).to(self._layers.device)
