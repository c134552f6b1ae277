"""From a model to a plan, and from a plan to a checkpoint: scan, plan, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.options import (
    BitsOpt,
    DeviceOpt,
    FuseOpt,
    GroupOpt,
    JobsOpt,
    JsonOpt,
    LadderOpt,
    PolicyOpt,
    ProfileOpt,
    RecipeOpt,
    RevisionOpt,
    SetOpt,
    SourceArg,
    ThresholdsOpt,
    numbers,
)
from kappaquant.commands.terminal import console, progress, show
from kappaquant.errors import PlanError

if TYPE_CHECKING:
    from kappaquant.planning.plan import Plan
    from kappaquant.sources.folder import Source


def scan(
    source: SourceArg,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the profile (JSON) here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw κ by layer and family (PNG; needs matplotlib).")] = None,
    bits: Annotated[
        str, typer.Option(help="Widths to measure the error at; '' for none, which is faster.")
    ] = "2,3,4,5,6,7,8",
    group_size: GroupOpt = 128,
    jobs: JobsOpt = None,
    device: DeviceOpt = None,
    revision: RevisionOpt = None,
    stream: Annotated[bool, typer.Option("--stream", help="From the Hub, one shard on disk at a time.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure every weight: κ, outliers, and the error at each bit width."""
    from kappaquant.commands.plots import kurtosis_by_layer, png_figure
    from kappaquant.commands.tables import profile_table
    from kappaquant.planning import profile as scanner
    from kappaquant.sources.folder import open_source

    if plot:
        png_figure(plot)
    opened = open_source(source, revision, stream=stream)
    with progress("scan") as report:
        profile = scanner.scan(
            opened, group_size=group_size, bits=numbers(bits, int, "--bits"), jobs=jobs, device=device,
            progress=lambda done, total: report("scan", done, total),
        )  # fmt: skip
    if output:
        profile.save(output)
    if plot:
        kurtosis_by_layer(profile, plot)
    show(profile.to_json() if as_json else profile_table(profile), as_json)


def plan(
    source: SourceArg,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan (JSON) here.")] = None,
    policy: PolicyOpt = "recipe",
    bits: BitsOpt = 3,
    recipe: RecipeOpt = "apex2",
    profile: ProfileOpt = None,
    thresholds: ThresholdsOpt = "4,8,15",
    ladder: LadderOpt = "3,4,5",
    group_size: GroupOpt = 128,
    overrides: SetOpt = None,
    fuse: FuseOpt = False,
    target: Annotated[
        str | None, typer.Option(help="vllm: warn of mixed widths that cost it speed, and list the numbers of cards.")
    ] = None,
    revision: RevisionOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose bits and show exact sizes; reads headers only and writes no weights."""
    from rich.filesize import decimal

    from kappaquant.checkpoints.layout import output_bytes
    from kappaquant.commands.tables import plan_table
    from kappaquant.models import sharding as parallel
    from kappaquant.planning.sizes import summary
    from kappaquant.sources.folder import open_source

    opened = open_source(source, revision, stream=True)
    chosen = (policy, bits, recipe, profile, thresholds, ladder, group_size, overrides)
    made = _make_plan(opened, *chosen, fuse, target)
    sizes = summary(made, opened.tensors, opened.config)
    files = output_bytes(opened.shards, made.format_of)
    if output:
        made.save(output)
    show(made.to_json() if as_json else plan_table(made, sizes, files), as_json)
    if fuse and not as_json:
        freely = _make_plan(opened, *chosen, False)
        raised = sum(made.bits(name) != freely.bits(name) for name in opened.tensors)
        cost = files - output_bytes(opened.shards, freely.format_of)
        console().print(f"--fuse-legal raised {raised} tensors, which cost {decimal(cost)} ({cost / files:.2%})")
    if target and not as_json:
        cards = parallel.sizes(opened.tensors, made.format_of, opened.config)
        console().print(
            f"cards that can share it (--tensor-parallel-size): {', '.join(map(str, cards))}", highlight=False
        )


def quantize(
    source: SourceArg,
    output: Annotated[Path, typer.Argument(help="New folder for the quantized checkpoint.")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Plan written by plan; else one is made here.")
    ] = None,
    policy: PolicyOpt = "recipe",
    bits: BitsOpt = 3,
    recipe: RecipeOpt = "apex2",
    profile: ProfileOpt = None,
    thresholds: ThresholdsOpt = "4,8,15",
    ladder: LadderOpt = "3,4,5",
    group_size: GroupOpt = 128,
    overrides: SetOpt = None,
    fuse: FuseOpt = False,
    effort: Annotated[str, typer.Option(help="best searches each group's scale; fast does not. Same bytes.")] = "best",
    target: Annotated[
        str, typer.Option("--format", help="kappaquant, or tq3_native for published loaders.")
    ] = "kappaquant",
    jobs: JobsOpt = None,
    device: DeviceOpt = None,
    revision: RevisionOpt = None,
    stream: Annotated[bool, typer.Option("--stream", help="From the Hub, one shard on disk at a time.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Keep tensors with NaN or infinity as they are.")
    ] = False,
) -> None:
    """Write the quantized checkpoint; run the same command again to resume a run that was cut off."""
    from rich.filesize import decimal

    from kappaquant.files.processes import warm_up

    warm_up(source, jobs)
    from kappaquant.planning.plan import Plan
    from kappaquant.quantizing.quantize import Options
    from kappaquant.quantizing.quantize import quantize as run
    from kappaquant.sources.folder import open_source

    options = Options(effort, target, jobs, device, allow_nonfinite)  # type: ignore[arg-type]
    opened = open_source(source, revision, stream=stream)
    if plan_file:
        if overrides:
            raise PlanError(f"--set does not change the plan file {plan_file}; give --set to the plan command")
        made = Plan.load(plan_file)
    else:
        made = _make_plan(opened, policy, bits, recipe, profile, thresholds, ladder, group_size, overrides, fuse)
    with progress("quantize") as report:
        path = run(opened, output, made, options, report)
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    console().print(f"{path}: {decimal(size)}", highlight=False)


def _make_plan(
    source: Source,
    policy: str,
    bits: int,
    recipe: str,
    profile: Path | None,
    thresholds: str,
    ladder: str,
    group_size: int,
    overrides: list[str] | None,
    fuse: bool,
    target: str | None = None,
) -> Plan:
    from kappaquant.planning.plan import make_plan, parse_override
    from kappaquant.planning.profile import Profile

    return make_plan(
        source.tensors, source.config, policy, bits=bits, recipe=recipe,
        profile=Profile.load(profile).kurtosis() if profile else None,
        thresholds=numbers(thresholds, float, "--thresholds"), ladder=numbers(ladder, int, "--ladder"), group_size=group_size,
        overrides=[parse_override(text) for text in overrides or []], fuse=fuse, target=target,
    )  # fmt: skip
