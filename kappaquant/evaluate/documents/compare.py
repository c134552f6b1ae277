"""Several checkpoints of one original side by side, from their evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from kappaquant.checkpoints.side_files import EVALUATION_NAME
from kappaquant.errors import UnsupportedError
from kappaquant.evaluate.documents.evaluation import (
    Evaluation,
    Measured,
    Score,
    Settings,
    SourceFacts,
    TaskReport,
    TextFacts,
)
from kappaquant.evaluate.measures.scores import score

# what two evaluations must share for their numbers to be comparable: parts of the report, and fields of each
_SHARED = {
    "source": ("config_sha256", "headers_sha256", "samples_sha256"),
    "text": ("sha256", "sequences", "tokens"),
    "settings": ("window", "dtype", "top_k", "exact", "activations", "begin"),
}
_SHARED_BY_TASKS = (
    "prompts_sha256",
    "questions",
    "shots",
    "max_tokens",
    "chat_template",
    "batch_size",
    "dtype",
    "activations",
)


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Attributes:
        nbytes: of its weight files.
        divergence: mean KL divergence from the original, nats; agreement: share of tokens with the same likeliest one.
        pareto: no other checkpoint is as small and as close, and better in one of both.
        tasks: share of right answers by task and metric, such as "gsm8k, exact_match, strict-match".
        predicted: mean KL divergence that its plan predicted, nats; None where it predicted none.
    """

    name: str
    nbytes: int
    bits_per_weight: float
    divergence: Measured
    agreement: Measured
    perplexity: Measured
    pareto: bool = False
    tasks: dict[str, Measured] = field(default_factory=dict)
    predicted: float | None = None


@dataclass(frozen=True)
class PairedRow:
    """Two checkpoints on the same questions, as ``Score`` has it for checkpoint and original."""

    task: str
    first: str
    second: str
    difference: Measured
    p_value: float
    significant: bool


@dataclass(frozen=True)
class Comparison:
    """Checkpoints, largest first, and the original and text that they were all measured with.

    Attributes:
        noise_floor: largest mean divergence of the original from itself in other batches, nats; None if never measured.
        original_tasks: the original's share of right answers, by task and metric.
        pairs: every two checkpoints that answered the same questions.
        rank_correlation: Spearman's, of predicted and measured divergences; None of fewer than three that have both.
    """

    rows: tuple[Row, ...]
    original: SourceFacts
    original_perplexity: Measured
    text: TextFacts
    noise_floor: float | None
    original_tasks: dict[str, Measured] = field(default_factory=dict)
    pairs: tuple[PairedRow, ...] = ()
    rank_correlation: float | None = None


def report_path(location: str | Path) -> Path:
    """The evaluation that belongs to an argument: the file itself, or ``evaluation.json`` in a checkpoint folder."""
    path = Path(location)
    return path / EVALUATION_NAME if path.is_dir() else path


def compare(evaluations: Mapping[str, Evaluation], against: SourceFacts | None = None) -> Comparison:
    """Set evaluations side by side.

    Args:
        evaluations: name to show -> evaluation.
        against: the original they must all be of; by default that of the first.

    Raises:
        UnsupportedError: none given, or two of different originals, texts or settings, or with other questions of a task of the
            same name, by name.
    """
    if not evaluations:
        raise UnsupportedError("no evaluation to compare; give checkpoints that kappaquant evaluate has measured")
    (first, reference), *_ = evaluations.items()
    for name, found in evaluations.items():
        for part, fields in _SHARED.items():
            there, here = getattr(reference, part), getattr(found, part)
            if field := _differing(there, here, fields):
                raise UnsupportedError(
                    f"{name}: {part}.{field} is {getattr(here, field)!r}{_of(here)}, but of {first} it is "
                    f"{getattr(there, field)!r}{_of(there)}; only evaluations with the same {part} compare"
                )
    if against and (field := _differing(against, reference.source, _SHARED["source"])):
        raise UnsupportedError(
            f"{first}: was measured against {reference.source.path}, which is not {against.path} ({field} differs); "
            f"give its own original, or evaluate again with --against {against.path}"
        )
    _check_tasks(evaluations)
    rows = [_row(name, found) for name, found in evaluations.items()]
    front = pareto_front(rows)
    floors = [found.noise_floor.mean for found in evaluations.values() if found.noise_floor]
    return Comparison(
        rows=tuple(replace(row, pareto=row in front) for row in sorted(rows, key=lambda row: -row.nbytes)),
        original=reference.source,
        original_perplexity=reference.perplexity.source,
        text=reference.text,
        noise_floor=max(floors, default=None),
        original_tasks={
            label: scored.source for found in evaluations.values() for label, scored in _scores(found).items()
        },
        pairs=tuple(_pairs(evaluations)),
        rank_correlation=_rank_correlation(rows),
    )


def _rank_correlation(rows: Sequence[Row]) -> float | None:
    from scipy.stats import spearmanr

    both = [(row.predicted, row.divergence.value) for row in rows if row.predicted is not None]
    if len(both) < 3:
        return None
    found = float(spearmanr(*zip(*both, strict=True)).statistic)
    return found if math.isfinite(found) else None


def _scores(found: Evaluation) -> dict[str, Score]:
    return {f"{task.task}, {scored.metric}": scored for task in found.tasks for scored in task.scores}


def _check_tasks(evaluations: Mapping[str, Evaluation]) -> None:
    """Tasks of one name must have been asked alike, of the same original by the same numbers."""
    seen: dict[str, tuple[str, TaskReport]] = {}
    for name, found in evaluations.items():
        for task in found.tasks:
            first, reference = seen.setdefault(task.task, (name, task))
            for what in _SHARED_BY_TASKS:
                if getattr(task, what) != getattr(reference, what):
                    raise UnsupportedError(
                        f"{name}: task {task.task}: {what} is {getattr(task, what)!r}, but of {first} it is "
                        f"{getattr(reference, what)!r}; only answers to the same questions, asked alike, compare"
                    )


def _pairs(evaluations: Mapping[str, Evaluation]) -> Iterator[PairedRow]:
    for (first, one), (second, other) in combinations(evaluations.items(), 2):
        there = _scores(other)
        for label, scored in _scores(one).items():
            if label in there:
                found = score(label, scored.checkpoint_outcomes, there[label].checkpoint_outcomes)
                yield PairedRow(label, first, second, found.difference, found.p_value, found.significant)


def _row(name: str, found: Evaluation) -> Row:
    return Row(
        name, found.checkpoint.bytes, found.checkpoint.bits_per_weight,
        Measured(found.divergence.mean, found.divergence.interval_95),
        Measured(found.divergence.top1_agreement, found.divergence.top1_interval_95), found.perplexity.checkpoint,
        tasks={label: scored.checkpoint for label, scored in _scores(found).items()},
        predicted=found.checkpoint.predicted_kld,
    )  # fmt: skip


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats, smallest first: none is as small and as close to the original, and better in one of both."""

    def beats(other: Row, row: Row) -> bool:
        there, here = (other.nbytes, other.divergence.value), (row.nbytes, row.divergence.value)
        return there != here and there[0] <= here[0] and there[1] <= here[1]

    front = [row for row in rows if not any(beats(other, row) for other in rows)]
    return sorted(front, key=lambda row: row.nbytes)


_Part = SourceFacts | TextFacts | Settings


def _differing(one: _Part, other: _Part, fields: Sequence[str]) -> str | None:
    return next((name for name in fields if getattr(one, name) != getattr(other, name)), None)


def _of(part: _Part) -> str:
    """What a part calls itself, in brackets, for messages about its hashes."""
    match part:
        case SourceFacts():
            return f" ({part.path})"
        case TextFacts():
            return f" ({part.name})"
    return ""
