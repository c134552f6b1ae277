"""An evaluation as Markdown: what the command prints and a README can take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kappaquant.evaluate.evaluation import DivergenceReport, Evaluation, Interval, Measured


def markdown(evaluation: Evaluation) -> str:
    """What was measured of what, and the tables."""
    e = evaluation
    head = (
        f"{e.checkpoint.path} against {e.source.path}: {e.checkpoint.bytes:,} bytes ({e.checkpoint.bits_per_weight:.3f} bits "
        f"per weight) against {e.source.bytes:,}; {e.text.tokens:,} tokens of {e.text.name} in {e.text.sequences:,} sequences"
    )
    return f"{head}\n\n{tables(e)}\n"


def tables(evaluation: Evaluation) -> str:
    """Divergence beside the noise floor, perplexities, then positions and families."""
    e, d, floor = evaluation, evaluation.divergence, evaluation.noise_floor
    least = "" if e.settings.exact else f" of the top {e.settings.top_k} and the rest"
    rows = [
        [f"KL divergence{least}, mean (nats)", *_both(d, floor, lambda r: _measured(r.mean, r.interval_95))],
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
    return "\n\n".join(sections)


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
