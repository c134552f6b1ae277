"""To folders that other programs open: export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kappaquant.commands.options import (
    BitsOpt,
    JobsOpt,
    JsonOpt,
    LadderOpt,
    ProfileOpt,
    RecipeOpt,
    RevisionOpt,
    ThresholdsOpt,
)
from kappaquant.commands.terminal import console, errors, progress
from kappaquant.errors import PlanError

if TYPE_CHECKING:
    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.planning.plan import Plan
    from kappaquant.sources.folder import Source

TARGETS = ("mlx",)


def export(
    source: Annotated[
        str, typer.Argument(help="The original model (folder or Hub id), or a quantized kappaquant checkpoint.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder.")],
    to: Annotated[str, typer.Option("--to", help="mlx: a folder for stock mlx_lm.")] = "mlx",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan written by plan.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="uniform, recipe or kurtosis; default recipe, or the bits that a quantized checkpoint has."),
    ] = None,
    bits: BitsOpt = 3,
    recipe: RecipeOpt = "apex2",
    profile: ProfileOpt = None,
    thresholds: ThresholdsOpt = "4,8,15",
    ladder: LadderOpt = "3,4,5",
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128; default the plan's, else 128.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="PATTERN=BITS or PATTERN=BITS:GROUP, e.g. '*.o_proj.weight=4:64'; last match wins."),
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate/--no-rotate", help="Fold a rotation into the weights.")] = True,
    effort: Annotated[str, typer.Option(help="best searches scale and bias of each group; fast does not.")] = "best",
    dtype: Annotated[
        str | None, typer.Option(help="BF16, F16 or F32 of scales and kept weights; default the source's.")
    ] = None,
    jobs: JobsOpt = None,
    revision: RevisionOpt = None,
    stream: Annotated[bool, typer.Option("--stream", help="From the Hub, few shards on disk at a time.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a mixed-precision folder that stock mlx_lm loads; run the same command again to resume a run that was cut off."""
    from kappaquant.files.processes import warm_up

    if to not in TARGETS:
        raise PlanError(f"--to {to!r}: must be one of {', '.join(TARGETS)}")
    warm_up(source, jobs)
    from transformers.utils import logging as transformers_logging

    from kappaquant.checkpoints.manifest import json_text
    from kappaquant.exports.mlx import Options, export_mlx

    transformers_logging.set_verbosity_error()  # hints at faster kernels, for the check
    opened = _open(source, revision, stream)
    settings = [_override(text) for text in overrides or []]
    groups = [] if group_size is None else [("*", group_size)]
    groups += [(pattern, size) for pattern, _, size in settings if size is not None]
    options = Options(rotate, effort, dtype, tuple(groups), jobs)  # type: ignore[arg-type]
    made = _plan(
        opened, plan_file, policy, [(pattern, width) for pattern, width, _ in settings],
        {"bits": bits, "recipe": recipe, "profile": profile, "thresholds": thresholds, "ladder": ladder},
    )  # fmt: skip
    with progress("export", "weights") as bar:
        report = export_mlx(opened, output, made, options, bar)
    if as_json:
        typer.echo(json_text(report), nl=False)
        return
    for note in report["notes"]:
        errors().print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for entry in report["dropped"]:
        errors().print(f"left out: {entry['tensors']}: {entry['why']}", markup=False, highlight=False, soft_wrap=True)
    exact = report["exactness"]
    if exact:
        errors().print(
            f"folded exactly: {exact['compared']} differs by less than {exact['relative_difference_below']:g}"
        )
    size = f"{report['bytes'] / 1e9:.3f} GB, {report['bits_per_weight']:.3f} bits per weight"
    console().print(f"{output}: {size}", highlight=False, soft_wrap=True)


def _open(source: str, revision: str | None, stream: bool) -> Source | Checkpoint:
    """A quantized checkpoint if the folder is one, else a plain source."""
    from kappaquant.checkpoints.checkpoint import open_checkpoint
    from kappaquant.formats.codebook import LEGACY_CONFIG_NAME, MANIFEST_NAME
    from kappaquant.sources.folder import open_source

    if any((Path(source) / name).exists() for name in (MANIFEST_NAME, LEGACY_CONFIG_NAME)):
        return open_checkpoint(source)
    return open_source(source, revision, stream=stream)


def _override(text: str) -> tuple[str, int, int | None]:
    """PATTERN=BITS[:GROUP]."""
    from kappaquant.planning.plan import parse_override

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
    overrides: list[tuple[str, int]],
    inputs: dict[str, Any],
) -> Plan:
    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.commands.options import numbers
    from kappaquant.exports.mlx import plan_of
    from kappaquant.planning.plan import Plan, make_plan, overridden
    from kappaquant.planning.profile import Profile

    checkpoint = opened if isinstance(opened, Checkpoint) else None
    tensors = {n: checkpoint.entry(n).info for n in checkpoint.keys()} if checkpoint else opened.tensors  # type: ignore[union-attr]
    if plan_file or (checkpoint and policy is None):
        made = Plan.load(plan_file) if plan_file else plan_of(checkpoint)  # type: ignore[arg-type]
        return overridden(made, tensors, opened.config, overrides) if overrides else made
    profile = inputs["profile"]
    return make_plan(
        tensors, opened.config, policy or "recipe", bits=inputs["bits"], recipe=inputs["recipe"],
        profile=Profile.load(profile).kurtosis() if profile else None,
        thresholds=numbers(inputs["thresholds"], float, "--thresholds"), ladder=numbers(inputs["ladder"], int, "--ladder"),
        overrides=overrides,
    )  # fmt: skip
