"""Stream a checkpoint through the encoder into a new one: bounded memory, several processes, resumable, atomic."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kappaquant.checkpoints import manifest as documents
from kappaquant.checkpoints.layout import ShardLayout, Target, check_target, shard_layout, stored_names
from kappaquant.errors import NonFiniteError, OutputError, PlanError
from kappaquant.files.processes import ItemError, choose_device, choose_jobs, each, pool
from kappaquant.files.safetensors import Stored
from kappaquant.files.unfinished import Commit, Partial
from kappaquant.formats.codebook import (
    EVALUATION_NAME,
    LEGACY_CONFIG_NAME,
    LEGACY_FORMAT,
    MANIFEST_NAME,
    QUANT_METHOD,
    legacy_codebook,
)
from kappaquant.formats.codec import EFFORTS, Effort
from kappaquant.planning.plan import Choice, Plan, check_legacy
from kappaquant.quantizing.slices import Sums, Unit, hash_stored, ranges, run_unit
from kappaquant.sources.folder import INDEX_NAME, Source
from kappaquant.version import __version__

Progress = Callable[[str, int, int], None]

_NOT_FINITE = "holds NaN, infinity or values beyond the format's norms"
_COMMIT_SECONDS = 2.0  # how much work a kill may cost; each commit is two fsyncs


@dataclass(frozen=True)
class Options:
    """How to quantize, apart from the plan.

    Attributes:
        effort: "best" searches each group's scale; "fast" does not.
        target: output format, "kappaquant" (v1) or "tq3_native".
        jobs: worker processes; None takes one per core (up to 8), or none for a small model. On CUDA always one.
        device: where to encode; None takes CUDA if there is one.
        allow_nonfinite: keep tensors with NaN or infinity as they are instead of raising.
    """

    effort: Effort = "best"
    target: Target = "kappaquant"
    jobs: int | None = None
    device: str | None = None
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise PlanError(f"effort {self.effort!r}: must be one of {', '.join(EFFORTS)}")
        check_target(self.target)
        choose_jobs(self.jobs, 0)
        choose_device(self.device)


def quantize(
    source: Source,
    output: str | Path,
    plan: Plan,
    options: Options | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Write ``source`` quantized by ``plan`` to the new folder ``output``.

    A run that is killed leaves ``<output>.partial``; the same call resumes it and ends with the same bytes. Everything
    that can be checked is checked before the first byte is written.

    Args:
        progress: called with a stage ("encode", "hash"), the source bytes done and the bytes in all.

    Raises:
        PlanError, SourceError, NonFiniteError, OutputError: see each; the message says what to do.
    """
    options = options or Options()
    plan.check(source.tensors, source.config)
    if options.target == LEGACY_FORMAT:
        check_legacy(plan)
        for bits in {plan.bits(name) for name in source.tensors if plan.format_of(name)}:
            legacy_codebook(bits, plan.group_size)
    output = Path(output).absolute()
    _check_output(source, output)
    with Partial(output, _fingerprint(source, plan, options)) as partial:
        if not partial.finished:
            _Run(source, plan, options, partial, progress).run()
        partial.finish()
    return output


def _check_output(source: Source, output: Path) -> None:
    folder = Path(source.label).resolve()
    if source.revision is None and folder in (output.resolve(), *output.resolve().parents):
        raise OutputError(f"{output}: lies in the source folder {folder}; choose another output")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; create it first")


def _fingerprint(source: Source, plan: Plan, options: Options) -> str:
    headers = {s: {n: (i.dtype, i.shape) for n, i in t.items()} for s, t in source.shards.items()}
    label, stamps = source.label, {}
    if source.revision is None:
        label = str(Path(label).resolve())
        for shard in source.shards:
            status = source.fetch(shard).stat()
            stamps[shard] = (status.st_size, status.st_mtime_ns)
    parts = [label, source.revision, headers, stamps, plan.to_json(), options.effort, options.target]
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()


class _Run:
    """One pass over a source, with what it has learnt so far."""

    def __init__(self, source: Source, plan: Plan, options: Options, partial: Partial, progress: Progress) -> None:
        self.source, self.plan, self.options, self.partial, self.progress = source, plan, options, partial, progress
        self.device = choose_device(options.device)
        self.sums: dict[tuple[str, int], Sums] = {}
        self.layouts: dict[str, ShardLayout] = {}
        self.total = sum(info.nbytes for info in source.tensors.values())
        self.done = 0

    def run(self) -> None:
        for record in self.partial.records:
            if "kept" in record:
                if not self.options.allow_nonfinite:
                    raise NonFiniteError(
                        f"{record['kept']}: {_NOT_FINITE}; repair the source, or use --allow-nonfinite"
                    )
                self.plan = _kept(self.plan, record["kept"])
        for shard in self.source.shards:
            self._lay_out(shard)
        with pool(self._jobs()) as workers:
            for shard in self.source.shards:
                while not self._encode(shard, workers):
                    self._lay_out(shard)
            hashes = self._hash(workers)
        self._write_documents(hashes)

    def _jobs(self) -> int:
        if self.device != "cpu":
            return 1
        return choose_jobs(self.options.jobs, self.total)

    def _lay_out(self, shard: str) -> None:
        tensors = self.source.shards[shard]
        formats = {name: self.plan.format_of(name) for name in tensors}
        layout = self.layouts[shard] = shard_layout(tensors, formats, self.options.target)
        self.sums = {key: sums for key, sums in self.sums.items() if key[0] not in tensors}
        records = self.partial.lay_out(shard, layout.header, layout.size)
        done = {(record["tensor"], record["start"]): Sums.from_dict(record["sums"]) for record in records}
        # without --allow-nonfinite, what an earlier run let pass is met again
        self.sums |= {key: s for key, s in done.items() if s.moments.finite or self.options.allow_nonfinite}

    def _encode(self, shard: str, workers: ProcessPoolExecutor | None) -> bool:
        """Encode what is missing of a shard; False if a tensor had to be kept and the shard must be laid out again."""
        layout = self.layouts[shard]
        wanted = [
            (info, start, stop) for info in self.source.shards[shard].values() for start, stop in ranges(info.shape)
        ]
        missing = [w for w in wanted if (w[0].name, w[1]) not in self.sums]
        if not missing:
            self._advance(sum(info.nbytes for info in self.source.shards[shard].values()))
            return True
        path, stored = self.source.locate(shard)
        target = self.partial.folder / shard
        units = [
            Unit(
                start, stop, path, stored[info.name], target, self.options.target,
                {n: layout.stored[n] for n in stored_names(info.name) if n in layout.stored},
                self.plan.format_of(info.name), self.options.effort, self.device, self.options.allow_nonfinite,
            )
            for info, start, stop in missing
        ]  # fmt: skip
        before = self.done
        self._advance(sum(i.nbytes for i in self.source.shards[shard].values()) - sum(u.nbytes for u in units))
        commit = Commit(self.partial, target, _COMMIT_SECONDS)
        try:
            for unit, sums in each(run_unit, units, workers):
                self.sums[unit.name, unit.start] = sums
                commit.add({"shard": shard, "tensor": unit.name, "start": unit.start, "sums": sums.to_dict()})
                self._advance(unit.nbytes)
        except ItemError as failure:
            commit.flush()
            if not isinstance(failure.problem, NonFiniteError) or not self.options.allow_nonfinite:
                raise failure.problem from failure
            if failure.item.fmt is None:
                raise failure.problem from failure
            self.plan = _kept(self.plan, failure.item.name)
            self.partial.append([{"kept": failure.item.name}])
            self.done = before
            return False
        commit.flush()
        self.source.release(shard)
        return True

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress("encode", self.done, self.total)

    def _hash(self, workers: ProcessPoolExecutor | None) -> dict[str, str]:
        tasks = [
            (self.partial.folder / shard, s) for shard, layout in self.layouts.items() for s in layout.stored.values()
        ]
        total, done, hashes = sum(s.info.nbytes for _, s in tasks), 0, {}
        for (_, stored), digest in each(_hash_task, tasks, workers):
            hashes[stored.info.name] = digest
            done += stored.info.nbytes
            self.progress("hash", done, total)
        return hashes

    def _write_documents(self, hashes: dict[str, str]) -> None:
        source, folder, tensors = self.source, self.partial.folder, self.source.tensors
        for name in source.side_files:
            if name in (MANIFEST_NAME, LEGACY_CONFIG_NAME, EVALUATION_NAME):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.fetch(name), folder / name)
        model = source.label if source.revision else Path(source.label).resolve().name
        config = dict(source.config)
        if self.options.target == QUANT_METHOD:
            config["quantization_config"] = documents.quantization_config(tensors, self.plan)
            sums: dict[str, Sums] = {}
            for name, info in tensors.items():
                sums[name] = sum((self.sums[name, start] for start, _ in ranges(info.shape)), Sums())
            manifest = documents.manifest(
                {"model": model, "revision": source.revision},
                tensors, self.plan, self.options.effort, sums, hashes, config["quantization_config"],
            )  # fmt: skip
            _write_json(folder / MANIFEST_NAME, manifest)
        else:
            _write_json(folder / LEGACY_CONFIG_NAME, documents.legacy_config(self.plan, tensors, model))
        if len(self.layouts) > 1 or "model.safetensors" not in self.layouts:
            _write_json(folder / INDEX_NAME, documents.index(self.layouts))
        _write_json(folder / "config.json", config)


def _kept(plan: Plan, name: str) -> Plan:
    """The plan with one more tensor left as it is; the reason must not tell which of its parts was met first."""
    return replace(plan, choices={**plan.choices, name: Choice(16, _NOT_FINITE)})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(documents.json_text(content), encoding="utf-8")


def _hash_task(task: tuple[Path, Stored]) -> str:
    return hash_stored(*task)
