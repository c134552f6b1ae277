"""From a model to a plan, and from a plan to a checkpoint: scan, plan, quantize."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.calibrating import calibration_of, check_calibration, kept_text
from kappaquant.commands.exploring import ExploreOpt, MeasuredOpt, check_explore, write_page
from kappaquant.commands.options import (
    DeviceOpt,
    FormatsOpt,
    FuseOpt,
    GroupOpt,
    JobsOpt,
    JsonOpt,
    OutputArg,
    OutputOpt,
    ProfileOpt,
    RevisionOpt,
    SetOpt,
    SourceArg,
    destination,
    numbers,
    refuse_stream,
)
from kappaquant.commands.planning import (
    ActiveOpt,
    BitsPerWeightOpt,
    ContextOpt,
    EvidenceOpt,
    FitOpt,
    Limits,
    PlanSettings,
    PolicyOpt,
    SizeOpt,
    check_files,
    warn_of_prediction,
    warn_of_slow_rounding,
)
from kappaquant.commands.terminal import console, progress, show
from kappaquant.errors import PlanError
from kappaquant.files.documents import check_file

if TYPE_CHECKING:
    from kappaquant.planning.plan import Plan
    from kappaquant.sources.source import Source

logger = logging.getLogger("kappaquant")


def scan(
    source: SourceArg,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the profile (JSON) here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw κ by layer and family (PNG; needs matplotlib).")] = None,
    bits: Annotated[
        str, typer.Option(help="Widths to measure the error at; '' for none, which is faster.")
    ] = "2,3,4,5,6,7,8",
    group_size: Annotated[int, typer.Option(help="Of the rotation: 32, 64, 128 or 256.")] = 128,
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
    from kappaquant.sources.open import open_source

    if output:
        check_file(output)
    if plot:
        png_figure(plot)
    refuse_stream(source, stream)
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
    policy: PolicyOpt = None,
    *,
    policy_options: dict[str, str],
    profile: ProfileOpt = None,
    evidence: EvidenceOpt = None,
    size: SizeOpt = None,
    bits_per_weight: BitsPerWeightOpt = None,
    active: ActiveOpt = None,
    fit: FitOpt = None,
    context: ContextOpt = None,
    group_size: GroupOpt = "auto",
    formats: FormatsOpt = None,
    overrides: SetOpt = None,
    fuse: FuseOpt = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="vllm: warn of mixed widths that cost it speed (the sensitivity policy makes none), and list the numbers of cards."
        ),
    ] = None,
    explore: ExploreOpt = None,
    measured: MeasuredOpt = None,
    revision: RevisionOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose bits and show exact sizes; reads headers only and writes no weights."""
    from kappaquant.checkpoints.open import container_by_id
    from kappaquant.commands.tables import plan_table
    from kappaquant.models import sharding
    from kappaquant.planning.share import mostly_kept
    from kappaquant.planning.sizes import summary
    from kappaquant.sources.open import open_source

    if output:
        check_file(output)
    check_explore(explore, evidence, measured)
    opened = open_source(source, revision, stream=True)
    limits = Limits(size, bits_per_weight, active, fit, context)
    of_plan = evidence
    if explore and policy != "sensitivity" and (policy or limits == Limits()):
        of_plan = None  # the page has it, and begins with the plan of another policy
    settings = PlanSettings(policy, policy_options, profile, of_plan, limits, group_size, overrides, formats)
    made = settings.plan(opened, fuse, target)
    sizes = summary(made, opened.tensors, opened.config)
    container = container_by_id("kappaquant")
    files = container.output_bytes(opened.shards, made.format_of)
    if said := mostly_kept(made, opened.tensors, opened.config):
        logger.warning("%s: the plan %s", source, said)
    if output:
        made.save(output)
    if explore and evidence:
        write_page(explore, source, revision, opened, made, evidence, measured, formats)
        if not as_json:
            console().print(f"{explore}: open it in a browser", markup=False, highlight=False)
    show(made.to_json() if as_json else plan_table(made, sizes, files), as_json)
    if not as_json and (said := settings.of_kinds(made)):
        console().print(said, markup=False, highlight=False, soft_wrap=True)
    if not as_json and (shared := limits.fitted(opened)):
        console().print(str(shared), highlight=False, soft_wrap=True)
    if fuse and not as_json:
        console().print(_price_of_fusing(made, settings.plan(opened, False), opened), highlight=False)
    if target and not as_json:
        cards = sharding.sizes(opened.tensors, made.format_of, opened.config)
        console().print(
            f"cards that can share it (--tensor-parallel-size): {', '.join(map(str, cards))}", highlight=False
        )


def quantize(
    source: SourceArg,
    place: OutputArg = None,
    output: OutputOpt = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Plan written by plan; else one is made here.")
    ] = None,
    policy: PolicyOpt = None,
    *,
    policy_options: dict[str, str],
    profile: ProfileOpt = None,
    evidence: EvidenceOpt = None,
    size: SizeOpt = None,
    bits_per_weight: BitsPerWeightOpt = None,
    active: ActiveOpt = None,
    fit: FitOpt = None,
    context: ContextOpt = None,
    group_size: Annotated[str | None, typer.Option(help="As for plan; 128 for tq3_native unless given.")] = None,
    formats: Annotated[str | None, typer.Option(help="As for plan, of those that the --format holds.")] = None,
    overrides: SetOpt = None,
    fuse: FuseOpt = False,
    effort: Annotated[
        str | None,
        typer.Option(
            help="fast; best (the default) searches each group's scale; calibrated knows what each layer reads, of a text that the "
            "model writes first, or of --calibration, which implies it. Same bytes."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate with: .txt, or .jsonl with a text or messages on each line."),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            help="How many of its tokens, at most, 131072 unless given; without a file how many the model writes, 32768.",
        ),
    ] = None,
    container: Annotated[
        str, typer.Option("--format", help="kappaquant, or tq3_native for published loaders.")
    ] = "kappaquant",
    jobs: JobsOpt = None,
    device: DeviceOpt = None,
    revision: RevisionOpt = None,
    stream: Annotated[bool, typer.Option("--stream", help="From the Hub, one shard on disk at a time.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Keep tensors with NaN or infinity as they are.")
    ] = False,
    allow_nothing: Annotated[
        bool, typer.Option("--allow-nothing", help="Write a checkpoint even if the plan packs nothing.")
    ] = False,
) -> None:
    """Write the quantized checkpoint; run the same command again to resume a run that was cut off."""
    from rich.filesize import decimal

    from kappaquant.files.processes import warm_up

    folder = destination(place, output)
    refuse_stream(source, stream)
    given: dict[str, object] = {
        "--policy": policy,
        "--profile": profile,
        "--evidence": evidence,
        "--size": size,
        "--bits-per-weight": bits_per_weight,
        "--active": active,
        "--fit": fit,
        "--context": context,
        "--group-size": group_size,
        "--formats": formats,
        "--set": overrides,
    }
    given |= {f"--{name.replace('_', '-')}": text for name, text in policy_options.items()} | {
        "--fuse-legal": fuse or None
    }
    if plan_file and (changed := [name for name, value in given.items() if value is not None]):
        raise PlanError(f"{changed[0]} does not change the plan file {plan_file}; give it to the plan command")
    warm_up(source, jobs)
    from kappaquant.checkpoints.open import container_by_id
    from kappaquant.planning.plan import Plan
    from kappaquant.quantizing.quantize import Options, check
    from kappaquant.quantizing.quantize import quantize as run
    from kappaquant.sources.open import open_source

    check_calibration(effort, calibration, calibration_tokens)
    calibrated = calibration is not None or effort == "calibrated"
    data_free = "best" if calibrated else effort or "best"
    options = Options(data_free, container, jobs, device, allow_nonfinite, allow_nothing)  # type: ignore[arg-type]
    opened = open_source(source, revision, stream=stream)
    if plan_file:
        made = Plan.load(plan_file)
    else:
        one = container_by_id(container).one_group_size  # which is 128 where nothing else is asked for
        group = group_size or ("128" if one else "auto")
        limits = Limits(size, bits_per_weight, active, fit, context)
        settings = PlanSettings(policy, policy_options, profile, evidence, limits, group, overrides, formats, container)
        made = settings.plan(opened, fuse)
        if said := settings.of_kinds(made):
            console().print(said, markup=False, highlight=False, soft_wrap=True)
    check(opened, made, options, calibrated)
    if not plan_file:
        check_files(made, opened, container)
    warn_of_slow_rounding(made, device)
    if not calibrated:
        warn_of_prediction(made)
    text = calibration_of(opened, folder, calibration, calibration_tokens, device) if calibrated else None
    with progress("quantize") as report:
        path = run(opened, folder, made, options, report, text)
    nbytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    console().print(f"{path}: {decimal(nbytes)}", highlight=False)
    if calibrated and not calibration:
        console().print(
            f"{kept_text(folder)}: what the model wrote; --calibration takes it for other plans",
            markup=False,
            highlight=False,
        )


def _price_of_fusing(made: Plan, freely: Plan, source: Source) -> str:
    """What it costs that fused tensors have one width, beside the plan that is free to choose."""
    from rich.filesize import decimal

    from kappaquant.planning.sizes import file_bytes

    changed = sum(made.bits(name) != freely.bits(name) for name in source.tensors)
    if "predicted_kld" in made.inputs:
        nats = [plan.inputs["predicted_kld"] for plan in (made, freely)]
        return f"--fuse-legal changed {changed} tensors: predicted {nats[0]:.4g} nats instead of {nats[1]:.4g}"
    files = file_bytes(source.shards, made.format_of)
    cost = files - file_bytes(source.shards, freely.format_of)
    return f"--fuse-legal raised {changed} tensors, which cost {decimal(cost)} ({cost / files:.2%})"
