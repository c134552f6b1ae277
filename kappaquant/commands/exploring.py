"""The page that plan --explore writes: what belongs to it on the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.planning import check_model
from kappaquant.errors import PlanError
from kappaquant.files.documents import check_file, write_whole

if TYPE_CHECKING:
    from kappaquant.formats.base import Format
    from kappaquant.planning.explorer.contents import Mark
    from kappaquant.planning.plan import Plan
    from kappaquant.planning.sensitivity import Sensitivities
    from kappaquant.sources.source import Source

ExploreOpt = Annotated[
    Path | None,
    typer.Option(help="Write a page (HTML) that shows bits, sizes and predicted loss, and solves for a size."),
]
MeasuredOpt = Annotated[
    list[Path] | None,
    typer.Option(help="Beside the page's curve: a checkpoint that evaluate has measured, or its report; repeatable."),
]


def check_explore(page: Path | None, evidence: Path | None, measured: list[Path] | None) -> None:
    """Refuse options that lack each other, before anything is read."""
    if page is None:
        if measured:
            raise PlanError(f"--measured {measured[0]}: belongs to a page; give --explore as well")
        return
    check_file(page)
    if evidence is None:
        raise PlanError(f"--explore {page}: shows what was measured; give --evidence as well")


def write_page(
    page: Path,
    location: str,
    revision: str | None,
    opened: Source,
    plan: Plan,
    evidence: Path,
    measured: list[Path] | None,
    kinds: str | None,
) -> None:
    """Write the explorer of a source, which chooses from the kinds of formats that --formats says; by default all that were measured."""
    from kappaquant.planning.explorer.page import page as made
    from kappaquant.planning.sensitivity import Sensitivities

    source = shlex.join([location, *(["--revision", revision] if revision else [])])
    known = Sensitivities.load(evidence)
    check_model(evidence, known, opened)
    plan = plan.among(known.kinds if kinds is None else plan.kinds)
    options = _plan_options(plan) + ("" if plan.kinds == known.kinds else f" --formats {','.join(plan.kinds)}")
    command = f"kappaquant plan {source} --evidence {shlex.quote(str(evidence))}{options}"
    text = made(
        plan, opened.tensors, opened.config, known, command=command, source=source, headers=_headers(opened, plan, known),
        measured=[_mark(path) for path in measured or []],
    )  # fmt: skip
    write_whole(page, text.encode())


def _headers(opened: Source, plan: Plan, known: Sensitivities) -> int:
    """Bytes of the headers of a checkpoint's files, whatever the page makes of what it chooses for."""
    from kappaquant.formats.registry import format_by_id
    from kappaquant.planning.sizes import header_bytes_at_most

    def formats(name: str) -> list[Format | None]:
        measured = known.tensors[name].errors if name in known.tensors else ()
        return [plan.format_of(name), *([None] if measured else []), *(format_by_id(fmt, name) for fmt in measured)]

    return header_bytes_at_most(opened.shards, formats)


def _plan_options(plan: Plan) -> str:
    """Options that the plan was made with, as a shell reads them."""
    words = [
        word for pattern, setting in plan.inputs.get("overrides", []) for word in ("--set", f"{pattern}={setting}")
    ]
    words += ["--group-size", str(plan.group_size)] if plan.group_size != "auto" else []
    words += ["--fuse-legal"] if plan.inputs.get("fuse") else []
    words += ["--target", plan.inputs["target"]] if "target" in plan.inputs else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _mark(location: Path) -> Mark:
    from kappaquant.evaluate.documents.compare import report_path
    from kappaquant.evaluate.documents.evaluation import Evaluation
    from kappaquant.planning.explorer.contents import Mark

    path = report_path(location)
    found = Evaluation.load(path)
    name = Path(found.checkpoint.path).name or str(location)
    return Mark(name, found.checkpoint.bytes, found.divergence.mean, found.divergence.interval_95, measured=True)
