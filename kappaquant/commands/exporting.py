"""To folders that other programs open: export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.options import (
    JobsOpt,
    JsonOpt,
    ProfileOpt,
    RevisionOpt,
    implied_policy,
    kurtosis_of,
    policy_of,
    refuse_stream,
)
from kappaquant.commands.terminal import console, errors, progress
from kappaquant.errors import PlanError
from kappaquant.exports.targets import target_by_name, targets

if TYPE_CHECKING:
    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.planning.make import Setting
    from kappaquant.planning.plan import Plan
    from kappaquant.sources.source import Source


def export(
    source: Annotated[
        str, typer.Argument(help="The original model (folder or Hub id), or a quantized kappaquant checkpoint.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder.")],
    to: Annotated[str, typer.Option("--to", help="; ".join(f"{t.name}: {t.help}" for t in targets().values()))] = "mlx",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan written by plan.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="{policies}; default recipe, or the bits that a quantized checkpoint has."),
    ] = None,
    *,
    policy_options: dict[str, str],
    profile: ProfileOpt = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128; default the plan's, else what fits.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="PATTERN=BITS or PATTERN=BITS:GROUP, e.g. '*.o_proj.weight=4:64'; last match wins."),
    ] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="Fold a rotation into the weights.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="best (the default) searches scale and bias of each group; fast does not.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="BF16, F16 or F32 of scales and kept weights; default the source's.")
    ] = None,
    jobs: JobsOpt = None,
    revision: RevisionOpt = None,
    stream: Annotated[bool, typer.Option("--stream", help="From the Hub, few shards on disk at a time.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a folder for another program; run the same command again to resume a run that was cut off."""
    from kappaquant.checkpoints.open import open_weights
    from kappaquant.files.processes import warm_up

    target = target_by_name(to)
    settings = [_override(text) for text in overrides or []]
    groups = [] if group_size is None else [("*", group_size)]
    groups += [(pattern, size) for pattern, _, size in settings if size is not None]
    options = {"rotate": rotate, "effort": effort, "dtype": dtype, "groups": tuple(groups) or None, "jobs": jobs}
    options = {name: value for name, value in options.items() if value is not None}
    target.check_options(options)
    warm_up(source, jobs)
    from transformers.utils import logging as transformers_logging

    from kappaquant.files.documents import json_text

    transformers_logging.set_verbosity_error()  # hints at faster kernels, for the check
    refuse_stream(source, stream)
    opened = open_weights(source, revision, stream=stream)
    made = _plan(
        opened, plan_file, policy, policy_options, profile, [(pattern, width) for pattern, width, _ in settings]
    )
    with progress("export", "weights") as bar:
        report = target.write(opened, output, made, options, bar)
    if as_json:
        typer.echo(json_text(report), nl=False)
        return
    for note in report.get("notes", ()):
        errors().print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for entry in report.get("dropped", ()):
        errors().print(f"left out: {entry['tensors']}: {entry['why']}", markup=False, highlight=False, soft_wrap=True)
    exact = report.get("exactness")
    if exact:
        errors().print(
            f"folded exactly: {exact['compared']} differs by less than {exact['relative_difference_below']:g}"
        )
    size = f"{report['bytes'] / 1e9:.3f} GB, {report['bits_per_weight']:.3f} bits per weight"
    console().print(f"{output}: {size}", highlight=False, soft_wrap=True)


def _override(text: str) -> tuple[str, Setting, int | None]:
    """PATTERN=BITS[:GROUP]."""
    from kappaquant.planning.make import parse_override

    setting, colon, group = text.rpartition(":")
    if not colon or "=" in group:
        return (*parse_override(text), None)
    if not group.isdecimal():
        raise PlanError(f"override {text!r}: write PATTERN=BITS or PATTERN=BITS:GROUP, such as '*.o_proj.weight=4:64'")
    return (*parse_override(setting), int(group))


def _plan(
    opened: Source | Checkpoint,
    plan_file: Path | None,
    policy: str | None,
    policy_options: dict[str, str],
    profile: Path | None,
    overrides: list[tuple[str, Setting]],
) -> Plan:
    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.planning.make import make_plan, overridden
    from kappaquant.planning.plan import Plan

    if plan_file or (isinstance(opened, Checkpoint) and policy is None):
        if (
            unused := [f"--{name}" for name in policy_options]
            + ["--profile"] * bool(profile)
            + ["--policy"] * bool(policy)
        ):
            what = f"the plan file {plan_file}" if plan_file else "the bits that the checkpoint has; name a --policy"
            raise PlanError(f"{unused[0]} does not change {what}")
        if plan_file:
            made = Plan.load(plan_file)
        else:
            from kappaquant.exports.mlx import plan_of

            made = plan_of(opened)  # type: ignore[arg-type]
        return overridden(made, opened.tensors, opened.config, overrides) if overrides else made
    chosen = policy_of(policy or implied_policy(policy_options, "recipe"), policy_options)
    return make_plan(opened.tensors, opened.config, chosen, profile=kurtosis_of(profile, chosen), overrides=overrides)
