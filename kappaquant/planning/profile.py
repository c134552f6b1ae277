"""Scan: what the weights look like, in one streaming pass over a source, as the evidence a plan is made from."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.files.documents import read_json, write_whole
from kappaquant.files.processes import ItemError, choose_device, choose_jobs, each, pool
from kappaquant.files.tensors import FLOATS, ranges
from kappaquant.formats.codebook import BITS, CodebookFormat, GroupedFormat, check_bits
from kappaquant.formats.entry import Entry
from kappaquant.formats.signs import check_group_size
from kappaquant.kernels import dispatch as ops
from kappaquant.models.roles import kinds_of, layer_of
from kappaquant.planning.moments import Moments
from kappaquant.sources.source import Source

PROFILE_VERSION = 1
TOP_SHARE = 0.001


@dataclass(frozen=True)
class TensorStats:
    """Statistics of one float tensor.

    Attributes:
        kurtosis: excess kurtosis κ (a Gaussian has 0); None if the tensor is empty, not finite, or of a magnitude
            whose fourth power float64 does not hold.
        absmax_over_sigma: largest magnitude in standard deviations; None likewise.
        top_energy: share of the sum of squares in the 0.1 % of weights with the largest magnitudes; None likewise.
        relative_mse: bits -> sum of squared errors of effort "fast" over the sum of squares, after rotation;
            empty for tensors of one dimension, and where a norm is beyond float16.
        finite: False if it holds NaN or infinity.
    """

    shape: tuple[int, ...]
    dtype: str
    family: str
    layer: int | None
    kurtosis: float | None
    absmax_over_sigma: float | None
    top_energy: float | None
    relative_mse: dict[int, float]
    finite: bool

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class FamilyStats:
    """Statistics of the finite tensors of one family; means are over tensors, as in the published tables."""

    tensors: int
    params: int
    mean_kurtosis: float
    max_kurtosis: float
    max_absmax_over_sigma: float
    mean_top_energy: float
    relative_mse: dict[int, float]


@dataclass(frozen=True)
class Profile:
    """The result of a scan, and its JSON.

    Attributes:
        model: the source's label; revision: its commit on the Hub.
        group_size: of the rotation that relative_mse is measured with.
    """

    model: str
    revision: str | None
    group_size: int
    tensors: dict[str, TensorStats]

    def kurtosis(self) -> dict[str, float | None]:
        """Tensor -> κ, what the kurtosis policy takes."""
        return {name: stats.kurtosis for name, stats in self.tensors.items()}

    def families(self) -> dict[str, FamilyStats]:
        """Family -> statistics, largest family first."""
        members: dict[str, list[TensorStats]] = {}
        for stats in self.tensors.values():
            if stats.kurtosis is not None:
                members.setdefault(stats.family, []).append(stats)
        families = {family: _family(stats) for family, stats in members.items()}
        return dict(sorted(families.items(), key=lambda item: -item[1].params))

    def to_json(self) -> str:
        head = {"profile_version": PROFILE_VERSION, "model": self.model, "revision": self.revision}
        body = {"group_size": self.group_size, "families": {k: asdict(v) for k, v in self.families().items()}}
        return json.dumps({**head, **body, "tensors": {k: asdict(v) for k, v in self.tensors.items()}}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON to ``path``, whole or not at all."""
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile's JSON. Raises PlanError."""
        data = read_json(Path(path), PlanError)
        if data.get("profile_version") != PROFILE_VERSION:
            raise PlanError(
                f"{path}: profile_version {data.get('profile_version')!r}; this version reads {PROFILE_VERSION}"
            )
        try:
            tensors = {name: _stats_from_json(entry) for name, entry in data["tensors"].items()}
            return cls(data["model"], data["revision"], data["group_size"], tensors)
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise PlanError(f"{path}: not a profile as scan writes it ({problem!r})") from problem


def _stats_from_json(entry: dict[str, Any]) -> TensorStats:
    mse = {int(bits): value for bits, value in entry["relative_mse"].items()}
    if not isinstance(entry["kurtosis"], float | int | None):
        raise TypeError(f"kurtosis {entry['kurtosis']!r}")
    return TensorStats(**{**entry, "shape": tuple(entry["shape"]), "relative_mse": mse})


def _family(stats: list[TensorStats]) -> FamilyStats:
    def numbers(key: Callable[[TensorStats], float | None]) -> list[float]:
        return [value for s in stats if (value := key(s)) is not None]

    kappas = numbers(lambda s: s.kurtosis)
    widths = sorted({bits for s in stats for bits in s.relative_mse})
    return FamilyStats(
        tensors=len(stats),
        params=sum(s.numel for s in stats),
        mean_kurtosis=float(np.mean(kappas)),
        max_kurtosis=max(kappas),
        max_absmax_over_sigma=max(numbers(lambda s: s.absmax_over_sigma)),
        mean_top_energy=float(np.mean(numbers(lambda s: s.top_energy))),
        relative_mse={b: float(np.mean(numbers(lambda s: s.relative_mse.get(b)))) for b in widths},  # noqa: B023
    )


def scan(
    source: Source,
    *,
    group_size: int = 128,
    bits: Iterable[int] = BITS,
    jobs: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure every float tensor of a source, slice by slice.

    Args:
        group_size: of the rotation before the error is measured.
        bits: widths to measure the error at; none makes the scan several times faster.
        jobs: processes; None takes one per core (up to 8).
        device: where to measure; None takes CUDA if there is one.
        progress: called with the source bytes done and in all.

    Raises:
        SourceError: a shard can not be read.
    """
    check_group_size(group_size)
    widths = tuple(bits)
    for b in widths:
        check_bits(b)
    books = [CodebookFormat(b, group_size) for b in widths]
    floats = {name: info for name, info in source.tensors.items() if info.dtype in FLOATS}
    formats = {name: books if len(info.shape) >= 2 else [] for name, info in floats.items()}
    parts = measured(source, formats, jobs, device, progress)
    kinds = kinds_of(source.tensors, source.config)
    stats = {}
    for name, info in floats.items():
        stats[name] = _finish(parts[name], info.shape, info.dtype, kinds[name].family, layer_of(name), books)
    label = source.label if source.revision else Path(source.label).resolve().name
    return Profile(label, source.revision, group_size, stats)


def measured(
    source: Source,
    formats: Mapping[str, Sequence[GroupedFormat]],
    jobs: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Measured]:
    """What these float tensors are, and what they lose in these formats of their [..., out, in]; others are not read. See ``scan``."""
    device = choose_device(device)
    total, done = sum(source.tensors[name].nbytes for name in formats), 0
    kinds = kinds_of(source.tensors, source.config)
    parts: dict[str, dict[int, Measured]] = {name: {} for name in formats}
    jobs = choose_jobs(jobs, total)
    with pool(jobs if device == "cpu" else 1) as workers:
        for shard, tensors in source.shards.items():
            wanted = {name: info for name, info in tensors.items() if name in formats}
            if not wanted:
                continue
            entries = source.read_entries(shard)
            tasks = [
                _Task(entries[name], start, stop, tuple(formats[name]), device, kinds[name].transposed)
                for name, info in wanted.items()
                for start, stop in ranges(info.shape, 2 if kinds[name].transposed else 1)
            ]
            try:
                for task, part in each(_measure, tasks, workers):
                    parts[task.entry.info.name][task.start] = part
                    done += task.nbytes
                    progress(done, total)
            except ItemError as failure:
                raise failure.problem from failure
            source.release(shard)
    empty = [Measured(Moments(), {}, Magnitudes())]
    return {
        name: reduce(operator.add, [pieces[start] for start in sorted(pieces)] or empty)
        for name, pieces in parts.items()
    }


@dataclass(frozen=True)
class _Task:
    entry: Entry
    start: int
    stop: int
    formats: tuple[GroupedFormat, ...]
    device: str
    transposed: bool

    @property
    def nbytes(self) -> int:
        return self.entry.info.nbytes * (self.stop - self.start) // self.entry.info.numel


@dataclass
class Magnitudes:
    """A histogram of magnitudes by the upper 16 bits of their float: exact for 16-bit dtypes, 0.4 % wide for float32."""

    bins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    energies: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, weight: torch.Tensor) -> Magnitudes:
        """Histogram of a finite float tensor."""
        x = weight.reshape(-1).abs()
        if x.dtype not in (torch.float16, torch.bfloat16):
            x = x.float()
        keys = x.view(torch.int16).int() if x.element_size() == 2 else x.view(torch.int32) >> 16
        counts = torch.bincount(keys, minlength=1)
        energies = torch.bincount(keys, weights=x.double().square_(), minlength=1)
        bins = counts.nonzero().flatten()
        return cls(bins.cpu().numpy(), counts[bins].cpu().numpy(), energies[bins].cpu().numpy())

    def __add__(self, other: Magnitudes) -> Magnitudes:
        bins, where = np.unique(np.concatenate([self.bins, other.bins]), return_inverse=True)
        counts, energies = np.zeros(len(bins), np.int64), np.zeros(len(bins))
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        np.add.at(energies, where, np.concatenate([self.energies, other.energies]))
        return Magnitudes(bins, counts, energies)

    def top_energy(self, share: float) -> float:
        """Part of the energy in the ``share`` of elements with the largest magnitudes; a bin is split evenly."""
        total = self.energies.sum()
        if total == 0:
            return 0.0
        counts, energies = self.counts[::-1], self.energies[::-1]
        before = np.cumsum(counts) - counts
        taken = np.clip(share * counts.sum() - before, 0, counts) / counts
        return float((taken * energies).sum() / total)


@dataclass
class Measured:
    """What a tensor, or a part of one, is.

    Attributes:
        squared_errors: format id -> sum of squared errors of effort "fast"; empty where the weights, or a norm in float16, are not finite.
    """

    moments: Moments
    squared_errors: dict[str, float]
    magnitudes: Magnitudes

    def __add__(self, other: Measured) -> Measured:
        # a format that one part has no error in has none in the sum
        errors = {f: e + other.squared_errors[f] for f, e in self.squared_errors.items() if f in other.squared_errors}
        return Measured(self.moments + other.moments, errors, self.magnitudes + other.magnitudes)

    def relative_mse(self, fmt: GroupedFormat) -> float:
        """Squared error in a format that was measured over the sum of squares."""
        return self.squared_errors[fmt.id] / self.moments.s2 if self.moments.s2 else 0.0


def _measure(task: _Task) -> Measured:
    info = task.entry.info
    weight = task.entry.elements(task.start, task.stop).to(task.device)
    moments = Moments.of(weight)
    if not moments.finite:
        return Measured(moments, {}, Magnitudes())
    errors: dict[str, float] = {}
    if task.formats:
        rows = weight.view(-1, info.shape[-1])
        if task.transposed:
            rows = weight.view(-1, *info.shape[-2:]).mT.reshape(-1, info.shape[-2])
        try:
            errors = _errors(task, rows)
        except NonFiniteError:  # finite weights whose norms are not: quantize refuses them, a scan reports what it can
            errors = {}
    return Measured(moments, errors, Magnitudes.of(weight))


def _errors(task: _Task, rows: torch.Tensor) -> dict[str, float]:
    """Sums of squared errors of effort "fast", by format; codebooks of one group size share a rotation."""
    name, found = task.entry.info.name, {}
    widths: dict[int, list[int]] = {}
    for fmt in task.formats:
        if isinstance(fmt, CodebookFormat):
            widths.setdefault(fmt.group_size, []).append(fmt.bits)
        else:
            found[fmt.id] = ops.encode(rows, fmt, "fast", name=name).squared_error
    for size, bits in widths.items():
        lost = ops.squared_errors(rows, size, bits, name)
        found |= {CodebookFormat(b, size).id: error for b, error in lost.items()}
    return found


def _finish(
    part: Measured, shape: tuple[int, ...], dtype: str, family: str, layer: int | None, books: Sequence[CodebookFormat]
) -> TensorStats:
    moments, sigma = part.moments, part.moments.std
    if not moments.count or not moments.finite or not math.isfinite(moments.kurtosis):
        return TensorStats(shape, dtype, family, layer, None, None, None, {}, moments.finite)
    mse = {fmt.bits: part.relative_mse(fmt) for fmt in books if fmt.id in part.squared_errors}
    return TensorStats(
        shape, dtype, family, layer, moments.kurtosis, moments.absmax / sigma if sigma else 0.0,
        part.magnitudes.top_energy(TOP_SHARE), mse, True,
    )  # fmt: skip
