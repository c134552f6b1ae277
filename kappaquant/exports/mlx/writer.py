"""An MLX folder from a source: laid out, checked, then filled unit by unit; bounded in memory, resumable, atomic."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint, Entry
from kappaquant.checkpoints.manifest import index, json_text
from kappaquant.errors import OutputError, PlanError
from kappaquant.exports.mlx.exactness import Check, Part
from kappaquant.exports.mlx.layout import Layout, Tensor, make_layout, summarized
from kappaquant.exports.mlx.models import config_json
from kappaquant.exports.mlx.shards import DTYPES, quantization_table, shard_layouts, stored_tensors
from kappaquant.exports.mlx.units import Sums, Unit, run_unit, slabs
from kappaquant.exports.weights import Weights, digest, is_own_card, of_checkpoint, of_source
from kappaquant.files.processes import ItemError, choose_jobs, each, pool
from kappaquant.files.unfinished import Commit, Partial
from kappaquant.formats.affine import EFFORTS, Effort, check_affine
from kappaquant.planning.plan import Plan
from kappaquant.sources.folder import INDEX_NAME, Source, read_json
from kappaquant.version import __version__

REPORT_NAME = "mlx_export.json"
_COMMIT_SECONDS = 2.0
# of the source's files: what describes how to read images, which the export does not
_VISION_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How to export, apart from the plan.

    Attributes:
        rotate: fold the norms and rotate the residual stream where that is exact.
        effort: "best" searches scale and bias of each group, "fast" takes the group's range as mlx_lm.convert does.
        dtype: "BF16", "F16" or "F32" for scales, biases and what is kept; None takes the source's.
        groups: (glob over parameter names, group size) pairs; the last that matches wins over the plan's group size.
        jobs: worker processes; None takes one per core (up to 8), or none for a small model.
    """

    rotate: bool = True
    effort: Effort = "best"
    dtype: str | None = None
    groups: tuple[tuple[str, int], ...] = ()
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise PlanError(f"effort {self.effort!r}: must be one of {', '.join(EFFORTS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise PlanError(f"dtype {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        for pattern, size in self.groups:
            check_affine(4, size, f"override {pattern!r}")
        choose_jobs(self.jobs, 0)


def export_mlx(
    source: Source | Checkpoint,
    output: str | Path,
    plan: Plan,
    options: Options | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write ``source`` as the new folder ``output``, which stock mlx_lm opens; returns the report that lies in it.

    A run that is killed leaves ``<output>.partial``; the same call resumes it and ends with the same bytes.

    Args:
        progress: called with a stage ("check", "export"), the weights done and in all.

    Raises:
        UnsupportedError: MLX has no class for the model, or folding would change what it computes.
        PlanError, SourceError, NonFiniteError, OutputError: see each; the message says what to do.
    """
    options = options or Options()
    weights = of_checkpoint(source) if isinstance(source, Checkpoint) else of_source(source)
    plan.check(weights.tensors, weights.config)
    output = Path(output).absolute()
    if weights.folder in (output.resolve(), *output.resolve().parents):
        raise OutputError(f"{output}: lies in the source folder {weights.folder}; choose another output")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; create it first")
    dtype = options.dtype or _dtype(weights)
    layout = make_layout(weights, plan, options.rotate, dtype, options.groups)
    settings = {**asdict(options), "jobs": None}
    fingerprint = digest(__version__, weights.identity, plan.to_json(), settings)
    with Partial(output, fingerprint) as partial:
        if not partial.finished:
            _Run(weights, plan, options, layout, dtype, partial, progress).run()
        partial.finish()
    return read_json(output / REPORT_NAME, OutputError)


def _dtype(weights: Weights) -> str:
    """The dtype of most of the source's weights; float16 is all that tq3_native tells."""
    sizes: dict[str, int] = {}
    for info in weights.tensors.values():
        if info.dtype in DTYPES:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    if not sizes:
        raise PlanError(f"{weights.label}: no tensor in {', '.join(DTYPES)}; give --dtype")
    return max(sizes, key=lambda dtype: sizes[dtype])


@dataclass
class _Step:
    """What can be done once these shards of the source are there: comparisons, then tensors."""

    sources: set[str]
    parts: list[Part]
    tensors: list[Tensor]


class _Run:
    """One pass over a source, shard by shard."""

    def __init__(
        self,
        weights: Weights,
        plan: Plan,
        options: Options,
        layout: Layout,
        dtype: str,
        partial: Partial,
        progress: Progress,
    ) -> None:
        self.weights, self.plan, self.options, self.layout = weights, plan, options, layout
        self.dtype, self.partial, self.progress = dtype, partial, progress
        self.shards = shard_layouts(layout.tensors)
        self.shard_of = {t.key: shard for shard, (_, members) in self.shards.items() for t in members}
        self.sums: dict[tuple[str, int], Sums] = {}
        self.total = sum(slab.numel for t in layout.tensors for slab in slabs(t))
        self.done = 0
        self.check = Check(layout)

    def run(self) -> None:
        for shard in self.shards:
            self._lay_out(shard)
        self.check.resume({r["checked"]: r["difference"] for r in self.partial.records if "checked" in r})
        steps = self._steps()
        last = {source: number for number, step in enumerate(steps) for source in step.sources}
        with pool(choose_jobs(self.options.jobs, self.total * 2)) as workers:
            held: dict[str, dict[str, Entry]] = {}
            for number, step in enumerate(steps):
                self._take(step, held, workers)
                for source in [s for s in held if last[s] <= number]:
                    del held[source]
                    self.weights.release(source)
        self._write_documents()

    def _steps(self) -> list[_Step]:
        """Work by the last of the source's shards it needs, so that few are held at once."""
        steps: dict[str, _Step] = {}
        # what needs no shard waits for the last one, so that a check that fails at once leaves nothing behind
        final = max(self.weights.shard_of.values())
        for part in self.check.parts:
            sources = {self.weights.shard_of[name] for tensor in part.tensors for name in tensor.sources}
            step = steps.setdefault(max(sources), _Step(set(), [], []))
            step.sources.update(sources)
            step.parts.append(part)
        for tensor in self.layout.tensors:
            sources = {self.weights.shard_of[name] for name in tensor.sources}
            step = steps.setdefault(max(sources, default=final), _Step(set(), [], []))
            step.sources.update(sources)
            step.tensors.append(tensor)
        return [steps[key] for key in sorted(steps)]

    def _lay_out(self, shard: str) -> None:
        layout, _ = self.shards[shard]
        records = self.partial.lay_out(shard, layout.header, layout.size)
        self.sums |= {(record["tensor"], record["start"]): Sums(*record["sums"]) for record in records}

    def _take(self, step: _Step, held: dict[str, dict[str, Entry]], workers: ProcessPoolExecutor | None) -> None:
        wanted = [(t, number, slab) for t in step.tensors for number, slab in enumerate(slabs(t))]
        missing = [w for w in wanted if (w[0].key, w[1]) not in self.sums]
        unchecked = [part for part in step.parts if part.name not in self.check.found]
        self._advance(sum(slab.numel for _, _, slab in wanted) - sum(slab.numel for _, _, slab in missing))
        if not missing and not unchecked:
            return
        for source in sorted(step.sources - held.keys()):
            held[source] = self.weights.locate(source)
        entries = {name: entry for source in held for name, entry in held[source].items()}
        for part in unchecked:
            self.partial.append([{"checked": part.name, "difference": self.check.run(part, entries)}])
            self.progress("check", len(self.check.found), len(self.check.parts))
        one_plus = self.layout.model.gain != "weight"
        for shard, (layout, _) in self.shards.items():
            path = self.partial.folder / shard
            units = [
                Unit(
                    tensor, number, slab, {name: entries[name] for name in self._names(tensor, slab.first, slab.last)},
                    one_plus, path, {i.name: layout.stored[i.name] for i in stored_tensors(tensor)}, self.options.effort,
                )
                for tensor, number, slab in missing if self.shard_of[tensor.key] == shard
            ]  # fmt: skip
            self._fill(units, shard, path, workers)

    def _fill(self, units: list[Unit], shard: str, path: Path, workers: ProcessPoolExecutor | None) -> None:
        commit = Commit(self.partial, path, _COMMIT_SECONDS)
        try:
            for unit, sums in each(run_unit, units, workers):
                self.sums[unit.tensor.key, unit.number] = sums
                record = {"shard": shard, "tensor": unit.tensor.key, "start": unit.number}
                commit.add({**record, "sums": [sums.squared_error, sums.energy]})
                self._advance(unit.slab.numel)
        except ItemError as failure:
            commit.flush()
            raise failure.problem from failure
        commit.flush()

    def _names(self, tensor: Tensor, first: int, last: int) -> list[str]:
        names = [] if tensor.action == "one" else [piece.name for piece in tensor.pieces[first:last]]
        return [*dict.fromkeys(names), *([tensor.gain] if tensor.gain else [])]

    def _advance(self, numel: int) -> None:
        self.done += numel
        self.progress("export", self.done, self.total)

    def _write_documents(self) -> None:
        folder, weights = self.partial.folder, self.weights
        left = [name for name in weights.side_files if name in _VISION_FILES or is_own_card(weights.fetch(name))]
        for name in weights.side_files:
            if name not in left:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(weights.fetch(name), folder / name)
        table = quantization_table(self.layout.tensors)
        config = config_json(self.layout.text, weights.config, self.layout.tied, DTYPES[self.dtype], table)
        layouts = {shard: layout for shard, (layout, _) in self.shards.items()}
        for name, content in (
            (INDEX_NAME, index(layouts)),
            (REPORT_NAME, self._report(left)),
            ("config.json", config),
        ):
            (folder / name).write_text(json_text(content), encoding="utf-8")

    def _report(self, left: list[str]) -> dict[str, Any]:
        tensors = {}
        for t in self.layout.tensors:
            part = sum((self.sums[t.key, number] for number, _ in enumerate(slabs(t))), Sums())
            if t.action != "one" and len(t.shape) > 1:
                mse = float(f"{part.squared_error / part.energy:.3g}") if part.energy else 0.0
                tensors[t.key] = {"bits": t.bits, "group_size": t.group_size, "relative_mse": mse}
        params = sum(slab.numel for t in self.layout.tensors for slab in slabs(t))
        size = sum(s.info.nbytes for layout, _ in self.shards.values() for s in layout.stored.values())
        return {
            "kappaquant_version": __version__,
            "source": {"model": self.weights.name, "revision": self.weights.revision},
            "quantized_twice": self.weights.quantized is not None,
            "rotated": self.layout.rotated,
            "effort": self.options.effort,
            "dtype": self.dtype,
            "parameters": params,
            "bytes": size,
            "bits_per_weight": round(8 * size / params, 4),
            "exactness": self.check.result(),
            "notes": self._notes(),
            "dropped": summarized(self.layout.dropped),
            "files_left_out": left,
            "plan": {"policy": self.plan.policy, "inputs": self.plan.inputs, "group_size": self.plan.group_size},
            "tensors": tensors,
        }

    def _notes(self) -> list[str]:
        notes = list(self.layout.notes)
        if self.weights.quantized:
            notes.insert(
                0,
                f"quantized twice: the source is a {self.weights.quantized} checkpoint, whose own error is in these weights and "
                "not in the errors below; an export of the original is better",
            )
        if self.layout.rotated and self.dtype != "F32":
            notes.append(f"kept weights were folded and rotated too, and so rounded to {DTYPES[self.dtype]} once more")
        return notes
