"""An evaluation as Markdown: what the command prints and a README can take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kappaquant.evaluate.documents.evaluation import (
    DivergenceReport,
    Evaluation,
    Interval,
    Measured,
    Settings,
    TaskReport,
    Throughput,
)


def markdown(evaluation: Evaluation) -> str:
    """What was measured of what, and the tables."""
    e = evaluation
    stored = f" (stored as {e.source.stored_as})" if e.source.stored_as else ""
    head = (
        f"{e.checkpoint.path} against {e.source.path}: {e.checkpoint.bytes:,} bytes ({e.checkpoint.bits_per_weight:.3f} bits "
        f"per weight) against {e.source.bytes:,}{stored}; {e.text.tokens:,} tokens of {e.text.name} in {e.text.sequences:,} sequences, "
        f"{begun(e.settings)}"
    )
    return f"{head}\n\n{tables(e)}\n"


def tables(evaluation: Evaluation) -> str:
    """Divergence beside the noise floor, perplexities, then positions, families, tasks and throughput."""
    e, d, floor = evaluation, evaluation.divergence, evaluation.noise_floor
    predicted = e.checkpoint.predicted_kld
    least = "" if e.settings.exact else f" of the top {e.settings.top_k} and the rest"
    rows = [
        [f"KL divergence{least}, mean (nats)", *_both(d, floor, lambda r: _measured(r.mean, r.interval_95))],
        *([["predicted by its plan", _number(predicted), ""]] if predicted is not None else []),
        ["median", *_both(d, floor, lambda r: _number(r.median))],
        ["99 %", *_both(d, floor, lambda r: _number(r.p99))],
        ["maximum", *_both(d, floor, lambda r: _number(r.maximum))],
        ["same likeliest token", *_both(d, floor, lambda r: _share(r.top1_agreement, r.top1_interval_95))],
        ["perplexity", _perplexity(e.perplexity.checkpoint), _perplexity(e.perplexity.source)],
    ]
    sections = [
        table(["", "checkpoint", "original, against itself" if floor else "original"], rows),
        _positions(d),
    ]
    if e.families:
        families = [[f.family, f"{f.bits:.3f}", _measured(f.mean, f.interval_95)] for f in e.families]
        sections.append(table(["only this family quantized", "bits per weight", "KL divergence (nats)"], families))
    if e.tasks:
        sections += [task_table(e.tasks), *(f"{sentence}." for sentence in verdicts(e.tasks))]
    if e.throughput:
        sections.append(throughput_table(e.throughput))
    return "\n\n".join(sections)


def begun(settings: Settings) -> str:
    """What every sequence began with, in words."""
    match settings.begin:
        case None:
            return "the first begun as the tokenizer does"
        case ():
            return "each begun with its own first token"
    return f"each begun with {' '.join(settings.begin)}"


def task_table(tasks: Sequence[TaskReport]) -> str:
    """A row for each way of counting right answers, both models on the same questions."""
    head = ["task", "questions", "shots", "checkpoint", "original", "difference", "p (McNemar)"]
    return table(
        head,
        [
            [
                f"{task.task}, {score.metric}", f"{task.questions:,}", f"{task.shots}", _share(score.checkpoint.value, score.checkpoint.interval_95),
                _share(score.source.value, score.source.interval_95), difference(score.difference), f"{score.p_value:.2g}",
            ]
            for task in tasks
            for score in task.scores
        ],
    )  # fmt: skip


def verdicts(tasks: Sequence[TaskReport]) -> list[str]:
    """What the paired tests allow to say, a sentence a score."""
    said = []
    for task in tasks:
        for score in task.scores:
            alone = f"{score.only_checkpoint} only by the checkpoint, {score.only_source} only by the original"
            verdict = "significant" if score.significant else "not significant"
            said.append(
                f"{task.task}, {score.metric}: answered right {alone}; the difference is {verdict} (McNemar's exact test, 5 %)"
            )
    return said


def difference(measured: Measured) -> str:
    """Percentage points with their interval."""
    points = f"{100 * measured.value:+.2f} points"
    ends = measured.interval_95
    return points + (f" ({100 * ends[0]:+.2f} to {100 * ends[1]:+.2f})" if ends else "")


def throughput_table(rows: Sequence[Throughput]) -> str:
    """Both models by context, and how much of the device's reading speed decoding uses."""
    head = [
        "model", "prompt", "batch", "decode tok/s", "prefill tok/s", "first token ms", "peak GiB", "GB per token", "of roofline"
    ]  # fmt: skip
    cells = [
        [
            f"{r.model}, {r.device}", f"{r.context:,}", f"{r.batch}", f"{r.decode_tokens_per_s:,.1f}", f"{r.prefill_tokens_per_s:,.0f}",
            f"{r.first_token_ms:,.1f}", f"{r.peak_gib:.2f}", f"{r.token_bytes / 1e9:.3g}",
            "" if r.roofline_share is None else f"{r.roofline_share:.1%} of {r.bandwidth_gb_per_s:,.0f} GB/s",
        ]
        for r in rows
    ]  # fmt: skip
    return table(head, cells)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in the text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _both(
    divergence: DivergenceReport, floor: DivergenceReport | None, cell: Callable[[DivergenceReport], str]
) -> list[str]:
    return [cell(divergence), cell(floor) if floor else ""]


def _positions(divergence: DivergenceReport) -> str:
    rows = [
        [
            f"{bin.first}" if bin.first == bin.last else f"{bin.first} to {bin.last}",
            _number(bin.mean),
            f"{bin.tokens:,}",
        ]
        for bin in divergence.by_position
    ]
    return table(["tokens of context", "KL divergence (nats)", "tokens"], rows)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _measured(value: float, interval: Interval | None) -> str:
    return _number(value) + (f" ({_number(interval[0])} to {_number(interval[1])})" if interval else "")


def _share(value: float, interval: Interval | None) -> str:
    return f"{value:.2%}" + (f" ({interval[0]:.2%} to {interval[1]:.2%})" if interval else "")


def _perplexity(found: Measured) -> str:
    ends = found.interval_95
    return f"{found.value:.4f}" + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")
