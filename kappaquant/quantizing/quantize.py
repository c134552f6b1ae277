"""Stream a checkpoint through the encoder into a new one: bounded memory, several processes, resumable, atomic."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kappaquant.checkpoints.container import Contents
from kappaquant.checkpoints.layout import ShardLayout
from kappaquant.checkpoints.open import container_by_id
from kappaquant.checkpoints.side_files import EVALUATION_NAME, MANIFEST_NAME, MARKER_NAME
from kappaquant.checkpoints.writer import Progress, Writer
from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.files.processes import ItemError, choose_device, choose_jobs, pool
from kappaquant.files.safetensors import TensorInfo
from kappaquant.files.tensors import ranges
from kappaquant.formats.base import EFFORTS, Effort, Format
from kappaquant.planning.plan import Plan
from kappaquant.planning.share import mostly_kept, packed_share
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.calibration.written import Model, model_of
from kappaquant.quantizing.slices import Slice, Sums, encode_slice
from kappaquant.sources.source import Source
from kappaquant.version import __version__

logger = logging.getLogger("kappaquant")

_NOT_FINITE = "holds NaN, infinity or values beyond the format's norms"


@dataclass(frozen=True)
class Options:
    """How to quantize, apart from the plan.

    Attributes:
        effort: "best" searches each group's scale; "fast" does not.
        container: what to write, "kappaquant" (v1) or "tq3_native".
        jobs: worker processes; None takes one per core (up to 8), or none for a small model. On CUDA always one.
        device: where to encode; None takes CUDA if there is one.
        allow_nonfinite: keep tensors with NaN or infinity as they are instead of raising.
        allow_nothing: write a checkpoint in which nothing is packed instead of raising.
    """

    effort: Effort = "best"
    container: str = "kappaquant"
    jobs: int | None = None
    device: str | None = None
    allow_nonfinite: bool = False
    allow_nothing: bool = False

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise PlanError(f"effort {self.effort!r}: must be one of {', '.join(EFFORTS)}")
        container_by_id(self.container)
        choose_jobs(self.jobs, 0)
        choose_device(self.device)


def quantize(
    source: Source,
    output: str | Path,
    plan: Plan,
    options: Options | None = None,
    progress: Progress = lambda stage, done, total: None,
    calibration: Calibration | None = None,
) -> Path:
    """Write ``source`` quantized by ``plan`` to the new folder ``output``.

    A run that is killed leaves ``<output>.partial``; the same call resumes it and ends with the same bytes. Everything
    that can be checked is checked before the first byte is written.

    Args:
        progress: called with a stage ("encode", "hash"), the source bytes done and the bytes in all.
        calibration: text that decoder layers read while their weights are rounded for it (docs/calibration.md); what is in no
            layer is encoded by ``options.effort``. The same machine and libraries give the same bytes, resumed or not.

    Raises:
        PlanError, SourceError, NonFiniteError, OutputError: see each; the message says what to do.
    """
    options = options or Options()
    check(source, plan, options, calibration is not None)
    if said := mostly_kept(plan, source.tensors, source.config):
        logger.warning("%s: the plan %s", source.label, said)
    if calibration and (writer_of_text := calibration.record.get("written_by")):
        model_of(source).check(Model(**writer_of_text), calibration.record.get("file", "calibration"))
    output = Path(output).absolute()
    with Writer(
        output, _fingerprint(source, plan, options, calibration), inside=source.folder, stage="encode", progress=progress,
        total=sum(info.nbytes for info in source.tensors.values()), to_json=Sums.to_dict, from_json=Sums.from_dict,
        keep_refused=True,
    ) as writer:  # fmt: skip
        if not writer.finished:
            _Run(source, plan, options, writer, calibration).run()
        writer.name()
    return output


def check(source: Source, plan: Plan, options: Options, calibrated: bool) -> None:
    """Raise PlanError for a plan that does not fit the source or the container, or packs nothing, or a container that is not calibrated."""
    plan.check(source.tensors, source.config)
    container_by_id(options.container).check_plan(plan, source.tensors)
    if not options.allow_nothing and not packed_share(plan, source.tensors):
        raise PlanError(
            f"{source.label}: the plan {mostly_kept(plan, source.tensors, source.config)}; set bits with --set PATTERN=BITS, or copy "
            "it with --allow-nothing"
        )
    crosswise = [name for name in plan.choices if (fmt := plan.format_of(name)) and fmt.transposed]
    if calibrated and crosswise:
        raise PlanError(
            f"{crosswise[0]}: is stored [..., in, out], and such weights are not calibrated; quantize without calibration"
        )
    if calibrated and options.container != "kappaquant":
        raise PlanError(f"--format {options.container} is not calibrated; write the kappaquant format")


def _fingerprint(source: Source, plan: Plan, options: Options, calibration: Calibration | None) -> str:
    shards = {shard: list(tensors) for shard, tensors in source.shards.items()}
    parts = [*source.identity(), shards, plan.record(), options.effort, options.container]
    parts += [calibration.record] if calibration else []
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()


class _Run:
    """One pass over a source, with what it has learnt so far."""

    def __init__(
        self, source: Source, plan: Plan, options: Options, writer: Writer[Sums], calibration: Calibration | None
    ) -> None:
        self.source, self.plan, self.options, self.writer = source, plan, options, writer
        self.calibration = calibration
        self.container = container_by_id(options.container)
        self.device = choose_device(options.device)

    def run(self) -> None:
        for record in self.writer.partial.records:
            if "kept" in record:
                if not self.options.allow_nonfinite:
                    raise NonFiniteError(
                        f"{record['kept']}: {_NOT_FINITE}; repair the source, or use --allow-nonfinite"
                    )
                self._keep(record["kept"])
        for shard in self.source.shards:
            self._lay_out(shard)
        jobs = choose_jobs(self.options.jobs, sum(i.nbytes for i in self.source.tensors.values()))
        with pool(jobs if self.device == "cpu" else 1) as workers:
            if self.calibration:
                self._calibrate(self.calibration, workers, jobs)
            for shard in self.source.shards:
                self._encode_whole(shard, workers)
            hashes = self.writer.hashes(workers)
        self._finish(hashes)

    def _format(self, name: str) -> Format | None:
        """As the container stores it."""
        fmt = self.plan.format_of(name)
        return fmt and self.container.variant(fmt)

    def _ranges(self, info: TensorInfo) -> Iterator[tuple[int, int]]:
        """Where a tensor is cut: between rows, or whole matrices where its format is transposed."""
        fmt = self._format(info.name)
        return ranges(info.shape, 2 if fmt and fmt.transposed else 1)

    def _keep(self, name: str) -> None:
        """Leave one more tensor as it is; the reason must not tell which of its parts was met first."""
        self.plan = self.plan.kept(name, _NOT_FINITE)

    def _lay_out(self, shard: str) -> None:
        tensors = self.source.shards[shard]
        stored = (self.container.stored(info, self._format(name)) for name, info in tensors.items())
        layout = ShardLayout.of(part for parts in stored for part in parts.values())
        self.writer.lay_out(shard, layout, tensors)
        if not self.options.allow_nonfinite:  # what an earlier run let pass is met again
            found = self.writer.found
            self.writer.found = {key: sums for key, sums in found.items() if sums.moments.finite}

    def _slices(self, shard: str) -> list[Slice]:
        """The pieces of one shard; the source's file is fetched if it is not there."""
        entries = self.source.read_entries(shard)
        layout, target = self.writer.layouts[shard], self.writer.folder / shard
        slices = []
        for name, info in self.source.shards[shard].items():
            fmt = self._format(name)
            stored = {suffix: layout.stored[part.name] for suffix, part in self.container.stored(info, fmt).items()}
            slices += [
                Slice(
                    start, stop, entries[name], target, self.container, stored, fmt, self.options.effort, self.device,
                    self.options.allow_nonfinite,
                )
                for start, stop in self._ranges(info)
            ]  # fmt: skip
        return slices

    def _calibrate(self, calibration: Calibration, workers: ProcessPoolExecutor | None, jobs: int) -> None:
        """Encode what lies in decoder layers, for the inputs that the text gives them."""
        from kappaquant.quantizing.calibration.rounding import Work, calibrate

        shard_of = self.source.shard_of

        @cache
        def by_tensor(shard: str) -> dict[str, list[Slice]]:
            found: dict[str, list[Slice]] = {}
            for piece in self._slices(shard):
                found.setdefault(piece.tensor, []).append(piece)
            return found

        def pieces(name: str) -> list[Slice]:
            """Of a tensor; a streamed source fetches its shard."""
            return by_tensor(shard_of[name])[name]

        whole = self.source.folder is not None
        # a table of a folder's, which other processes can take over
        known = {name: pieces(name) for name in self.source.tensors} if whole else {}
        formats = {name: fmt for name in self.source.tensors if (fmt := self._format(name))}
        work = Work(
            self.source, calibration, formats, known.__getitem__ if whole else pieces, frozenset(self.writer.found)
        )

        def finish(shard: str) -> None:
            """What else is in a shard, while a streamed source has it."""
            if not whole:
                self._encode_whole(shard, workers)

        calibrate(work, self.writer, self.device, workers, jobs, finish)
        self.writer.done = 0  # shards are gone through next, and what was found is counted there

    def _encode_whole(self, shard: str, workers: ProcessPoolExecutor | None) -> None:
        """Encode what is missing of a shard, and let go of the source's."""
        while not self._encode(shard, workers):
            self._lay_out(shard)
        self.source.release(shard)

    def _encode(self, shard: str, workers: ProcessPoolExecutor | None) -> bool:
        """Encode what is missing of a shard; False if a tensor had to be kept and the shard must be laid out again."""
        tensors = self.source.shards[shard]
        if all((name, start) in self.writer.found for name, info in tensors.items() for start, _ in self._ranges(info)):
            self.writer.advance(sum(info.nbytes for info in tensors.values()))
            return True
        before = self.writer.done
        try:
            self.writer.fill(shard, self.writer.missing(self._slices(shard)), encode_slice, workers)
        except ItemError as failure:
            refused: Slice = failure.item
            if not isinstance(failure.problem, NonFiniteError) or not self.options.allow_nonfinite or not refused.fmt:
                raise failure.problem from failure
            self._keep(refused.tensor)
            self.writer.partial.append([{"kept": refused.tensor}])
            self.writer.done = before
            return False
        return True

    def _finish(self, hashes: dict[str, str]) -> None:
        source, tensors = self.source, self.source.tensors
        formats = {name: self._format(name) for name in tensors}
        measured = {}
        for name, info in tensors.items():
            sums = sum((self.writer.found[name, start] for start, _ in self._ranges(info)), Sums())
            measured[name] = sums.measured(formats[name] is not None)
        contents = Contents(
            source.name, source.revision, source.config, tensors, formats, self.plan,
            "calibrated" if self.calibration else self.options.effort, measured, hashes, self.writer.layouts,
            self.calibration.record if self.calibration else None, source.stored_as,
        )  # fmt: skip
        left = (MANIFEST_NAME, MARKER_NAME, EVALUATION_NAME)
        files = {name: source.fetch(name) for name in source.side_files if name not in left}
        self.writer.finish(self.container.documents(contents), files)
