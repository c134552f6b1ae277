"""Evaluated checkpoints side by side, and on the Hub: compare, card, push."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kappaquant.commands.options import CheckpointArg, JsonOpt, RevisionOpt, in_checkpoint, refuse_unused
from kappaquant.commands.terminal import console, errors, show

if TYPE_CHECKING:
    from kappaquant.evaluate.documents.compare import Comparison
    from kappaquant.evaluate.documents.evaluation import Measured


def compare(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Checkpoints (folders or Hub ids) that hold an evaluation.json, or such files themselves."),
    ],
    against: Annotated[
        str | None, typer.Option(help="The original (folder or Hub id) that all must have been measured against.")
    ] = None,
    revision: RevisionOpt = None,
    plot: Annotated[Path | None, typer.Option(help="Draw divergence against size (PNG; needs matplotlib).")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Set evaluated checkpoints of one original side by side: size, KL divergence, agreement, perplexity, tasks."""
    from kappaquant.commands.plots import pareto, png_figure
    from kappaquant.evaluate.documents.compare import compare as run
    from kappaquant.evaluate.documents.evaluation import Evaluation
    from kappaquant.evaluate.runs.pair import source_facts
    from kappaquant.sources.folder import LocalSource
    from kappaquant.sources.open import open_source

    if against is None:
        refuse_unused({"--revision": revision}, "without --against a Hub id")
    if plot:
        png_figure(plot)
    evaluations = {str(path): Evaluation.load(_report(path)) for path in checkpoints}
    facts = None
    if against:
        source = open_source(against, revision)
        assert isinstance(source, LocalSource)  # only a streamed source is another
        facts = source_facts(source)
    comparison = run(evaluations, facts)
    if plot:
        pareto(comparison, plot)
    show(json.dumps(asdict(comparison), indent=1, ensure_ascii=False) if as_json else _table(comparison), as_json)


def _report(location: str) -> Path:
    """The evaluation in a folder, in a repository of the Hub, of which nothing else is fetched, or the file itself."""
    from kappaquant.checkpoints.side_files import EVALUATION_NAME
    from kappaquant.evaluate.documents.compare import report_path
    from kappaquant.sources.location import is_hub_id, local_file

    return local_file(location, EVALUATION_NAME) if is_hub_id(location) else report_path(location)


def _table(comparison: Comparison) -> Any:
    from rich.console import Group
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"against {comparison.original.path}"), title_justify="left")
    tasks = list(comparison.original_tasks)
    predicted = ["predicted"] if any(row.predicted is not None for row in comparison.rows) else []
    for column in (
        "checkpoint",
        "size",
        "bits/weight",
        "KLD, nats",
        *predicted,
        "same top token",
        "perplexity",
        *tasks,
    ):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    original = comparison.original
    table.add_row(
        "original", decimal(original.bytes), "", "", *("" for _ in predicted), "", _cell(comparison.original_perplexity, "{:.4f}"),
        *(_cell(comparison.original_tasks[task], "{:.2%}") for task in tasks),
    )  # fmt: skip
    table.add_section()
    for row in comparison.rows:
        table.add_row(
            escape(row.name) + " *" * row.pareto, decimal(row.nbytes), f"{row.bits_per_weight:.3f}",
            _cell(row.divergence, "{:.3g}"), *("–" if row.predicted is None else f"{row.predicted:.3g}" for _ in predicted),
            _cell(row.agreement, "{:.2%}"), _cell(row.perplexity, "{:.4f}"),
            *(_cell(row.tasks[task], "{:.2%}") if task in row.tasks else "–" for task in tasks),
        )  # fmt: skip
    floor = (
        f"\nnoise floor of the original: {comparison.noise_floor:.3g} nats"
        if comparison.noise_floor is not None
        else ""
    )
    if comparison.rank_correlation is not None:
        floor += f"\nrank correlation of predicted and measured KLD: {comparison.rank_correlation:.3f}"
    table.caption = (
        f"{comparison.text.tokens:,} predicted tokens of {escape(comparison.text.name)}; in brackets 95 % intervals; "
        f"*: none is both smaller and closer{floor}"
    )
    return Group(table, _pairs(comparison)) if comparison.pairs else table


def _pairs(comparison: Comparison) -> Any:
    """Checkpoints two by two on the same questions."""
    from rich.markup import escape
    from rich.table import Table

    from kappaquant.evaluate.documents.markdown import difference

    table = Table(title="two by two on the same questions", title_justify="left")
    for column in ("task", "first", "second", "first minus second", "p (McNemar)", "at 5 %"):
        table.add_column(column)
    for pair in comparison.pairs:
        verdict = "significant" if pair.significant else "not significant"
        table.add_row(
            pair.task, escape(pair.first), escape(pair.second), difference(pair.difference), f"{pair.p_value:.2g}", verdict
        )  # fmt: skip
    return table


def _cell(measured: Measured, form: str) -> str:
    value = form.format(measured.value)
    if measured.interval_95 is None:
        return value
    low, high = map(form.format, measured.interval_95)
    return f"{value} [{low}, {high}]"


def card(
    checkpoint: CheckpointArg,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default README.md in the checkpoint.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="The checkpoint's evaluation; default its evaluation.json, if there is one.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the original, if it was a local folder.")] = None,
    source_license: Annotated[
        str | None,
        typer.Option(help="Licence of the original, as the Hub calls it, e.g. apache-2.0; default by its card."),
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(help="Who made the checkpoint.")] = None,
    repo: Annotated[
        str | None, typer.Option(help="Hub id the checkpoint will have, for the lines that load it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that kappaquant did not write.")] = False,
) -> None:
    """Write the checkpoint's model card from its manifest and evaluation."""
    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.checkpoints.side_files import EVALUATION_NAME
    from kappaquant.publishing.card import CARD_NAME, make_card, write_card

    opened = open_checkpoint(checkpoint)
    path = output or in_checkpoint(opened.path, CARD_NAME, "-o")
    default = opened.path / EVALUATION_NAME
    made = make_card(
        opened, report or (default if default.exists() else None), base_model=base_model,
        source_license=source_license, quantized_by=quantized_by, repo=repo,
    )  # fmt: skip
    write_card(made, path, force=force)
    for notice in made.notices:
        errors().print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
    console().print(str(path), highlight=False, markup=False)


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Quantized checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; made if it does not exist.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Upload in spite of what speaks against it, and name it.")
    ] = False,
) -> None:
    """Upload the checkpoint and its card; refused when verify fails or the card has no evaluation. Run again to resume."""
    from kappaquant.publishing.push import push as run

    url = run(checkpoint, repo, private=private, revision=revision, force=force)
    console().print(url, highlight=False, markup=False)
