"""An MLX folder from a source: laid out, checked, then filled unit by unit; bounded in memory, resumable, atomic."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.layout import index_of
from kappaquant.checkpoints.writer import Progress, Writer
from kappaquant.errors import OutputError, PlanError
from kappaquant.exports.mlx.exactness import Check, Part
from kappaquant.exports.mlx.layout import Layout, Tensor, make_layout, summarized
from kappaquant.exports.mlx.models import config_json
from kappaquant.exports.mlx.shards import DTYPES, quantization_table, shard_layouts, stored_tensors
from kappaquant.exports.mlx.slabs import SlabWork, Sums, make_slab, slabs
from kappaquant.exports.weights import Weights
from kappaquant.files.documents import digest, read_json
from kappaquant.files.processes import ItemError, choose_jobs, pool
from kappaquant.formats.affine import EFFORTS, GROUP_SIZES, Effort, check_affine
from kappaquant.formats.codebook import AUTO, CodebookFormat
from kappaquant.formats.entry import Entry
from kappaquant.planning.plan import KEPT, Choice, Plan
from kappaquant.sources.source import INDEX_NAME
from kappaquant.version import __version__

_WIDEST = max(GROUP_SIZES)
REPORT_NAME = "mlx_export.json"
# of the source's files: what describes how to read images, which the export does not
_VISION_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
    weights: Weights,
    output: str | Path,
    plan: Plan,
    options: Options | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write ``weights``, a source or a quantized checkpoint, as the new folder ``output``, which stock mlx_lm opens; returns the report that lies in it.

    A run that is killed leaves ``<output>.partial``; the same call resumes it and ends with the same bytes.

    Args:
        progress: called with a stage ("check", "export"), the weights done and in all.

    Raises:
        UnsupportedError: MLX has no class for the model, or folding would change what it computes.
        PlanError, SourceError, NonFiniteError, OutputError: see each; the message says what to do.
    """
    options = options or Options()
    plan.check(weights.tensors, weights.config)
    output = Path(output).absolute()
    dtype = options.dtype or _dtype(weights)
    layout = make_layout(weights, plan, options.rotate, dtype, options.groups)
    settings = {**asdict(options), "jobs": None}
    fingerprint = digest(__version__, weights.identity(), plan.record(), settings)
    with Writer(
        output, fingerprint, inside=weights.folder, stage="export", progress=progress,
        total=sum(slab.numel for t in layout.tensors for slab in slabs(t)), to_json=Sums.to_json, from_json=Sums.from_json, keep_refused=True,
    ) as writer:  # fmt: skip
        if not writer.finished:
            _Run(weights, plan, options, layout, dtype, writer).run()
        writer.name()
    return read_json(output / REPORT_NAME, OutputError)


def plan_of(checkpoint: Checkpoint) -> Plan:
    """A plan of the bits and groups that a checkpoint has, as far as MLX has them."""
    choices = {}
    for name in checkpoint.keys():
        fmt = checkpoint.format_of(name)
        group = min(getattr(fmt, "group_size", _WIDEST), _WIDEST)
        kept = KEPT if fmt is None else CodebookFormat(fmt.bits, group).id
        choices[name] = Choice(kept, "as in the checkpoint")
    return Plan(choices, AUTO, "checkpoint", {})


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
        writer: Writer[Sums],
    ) -> None:
        self.weights, self.plan, self.options, self.layout = weights, plan, options, layout
        self.dtype, self.writer = dtype, writer
        self.shards = shard_layouts(layout.tensors)
        self.shard_of = {t.key: shard for shard, (_, members) in self.shards.items() for t in members}
        self.check = Check(layout)

    def run(self) -> None:
        for shard, (layout, _) in self.shards.items():
            self.writer.lay_out(shard, layout)
        self.check.resume({r["checked"]: r["difference"] for r in self.writer.partial.records if "checked" in r})
        steps = self._steps()
        last = {source: number for number, step in enumerate(steps) for source in step.sources}
        with pool(
            choose_jobs(self.options.jobs, sum(slab.numel for t in self.layout.tensors for slab in slabs(t)) * 2)
        ) as workers:
            held: dict[str, dict[str, Entry]] = {}
            for number, step in enumerate(steps):
                self._take(step, held, workers)
                for source in [s for s in held if last[s] <= number]:
                    del held[source]
                    self.weights.release(source)
        self._finish()

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

    def _take(self, step: _Step, held: dict[str, dict[str, Entry]], workers: ProcessPoolExecutor | None) -> None:
        unchecked = [part for part in step.parts if part.name not in self.check.found]
        numbered = [(t, number, slab) for t in step.tensors for number, slab in enumerate(slabs(t))]
        wanted = [w for w in numbered if (w[0].key, w[1]) not in self.writer.found]
        self.writer.advance(sum(w[2].numel for w in numbered) - sum(w[2].numel for w in wanted))
        if not wanted and not unchecked:
            return
        for source in sorted(step.sources - held.keys()):
            held[source] = self.weights.read_entries(source)
        entries = {name: entry for source in held for name, entry in held[source].items()}
        for part in unchecked:
            self.writer.partial.append([{"checked": part.name, "difference": self.check.run(part, entries)}])
            self.writer.report("check", len(self.check.found), len(self.check.parts))
        one_plus = self.layout.model.gain != "weight"
        for shard, (layout, _) in self.shards.items():
            path = self.writer.folder / shard
            units = [
                SlabWork(
                    tensor, number, slab, {name: entries[name] for name in self._names(tensor, slab.first, slab.last)},
                    one_plus, path, {i.name: layout.stored[i.name] for i in stored_tensors(tensor)}, self.options.effort,
                )
                for tensor, number, slab in wanted if self.shard_of[tensor.key] == shard
            ]  # fmt: skip
            try:
                self.writer.fill(shard, units, make_slab, workers)
            except ItemError as failure:
                raise failure.problem from failure

    def _names(self, tensor: Tensor, first: int, last: int) -> list[str]:
        names = [] if tensor.action == "one" else [piece.name for piece in tensor.pieces[first:last]]
        return [*dict.fromkeys(names), *([tensor.gain] if tensor.gain else [])]

    def _finish(self) -> None:
        weights = self.weights
        left = [name for name in weights.side_files if name in _VISION_FILES]
        table = quantization_table(self.layout.tensors)
        config = config_json(self.layout.text, weights.config, self.layout.tied, DTYPES[self.dtype], table)
        documents = {
            INDEX_NAME: index_of({shard: layout for shard, (layout, _) in self.shards.items()}),
            REPORT_NAME: self._report(left),
            "config.json": config,
        }
        self.writer.finish(documents, {name: weights.fetch(name) for name in weights.side_files if name not in left})

    def _report(self, left: list[str]) -> dict[str, Any]:
        tensors = {}
        for t in self.layout.tensors:
            part = sum((self.writer.found[t.key, number] for number, _ in enumerate(slabs(t))), Sums())
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
