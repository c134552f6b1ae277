"""The command line: each command imports what it needs when it runs, prints with rich, and ends with 2 on bad input."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kappaquant.errors import KappaquantError, PlanError

if TYPE_CHECKING:
    from kappaquant.plan import Plan
    from kappaquant.source import Source

app = typer.Typer(
    help="Mixed-precision codebook quantization of large language models, bits chosen by evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SourceArg = Annotated[
    str, typer.Argument(help="Folder with config.json and safetensors, or a Hub id such as owner/name.")
]
CheckpointArg = Annotated[Path, typer.Argument(help="Quantized checkpoint folder, kappaquant or tq3_native.")]
OriginalOpt = Annotated[
    str | None, typer.Option("--source", help="Original model (folder or Hub id): shapes for a tq3_native checkpoint.")
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; it is pinned to a commit.")]
GroupOpt = Annotated[int, typer.Option(help="Weights per norm: 32, 64, 128 or 256.")]
JobsOpt = Annotated[int | None, typer.Option(help="Worker processes; default one per core, up to 8.")]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu or cuda; default CUDA if there is one.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
PolicyOpt = Annotated[str, typer.Option(help="uniform, recipe or kurtosis.")]
BitsOpt = Annotated[int, typer.Option(help="Bits of the uniform policy, 2 to 8.")]
RecipeOpt = Annotated[str, typer.Option(help="apex, apex2 or apex3.")]
ProfileOpt = Annotated[Path | None, typer.Option(help="Profile written by scan; the kurtosis policy needs it.")]
ThresholdsOpt = Annotated[
    str, typer.Option(help="Kurtosis policy: κ at which each width of the ladder ends, ascending.")
]
LadderOpt = Annotated[str, typer.Option(help="Kurtosis policy: widths, one per threshold; 16 bits above the last.")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", help="PATTERN=BITS, e.g. '*.o_proj.weight=4'; last match wins.")
]
FuseOpt = Annotated[bool, typer.Option("--fuse", help="Equal bits for q/k/v and gate/up, which serving engines fuse.")]
MaxTokensOpt = Annotated[int, typer.Option(help="Tokens to generate at most.")]
TemperatureOpt = Annotated[float, typer.Option(help="0 takes the most likely token.")]


def main() -> None:
    """Entry point: one line and exit code 2 for what the input got wrong; a traceback only for our own mistakes."""
    from rich.logging import RichHandler

    logging.basicConfig(
        format="%(message)s", handlers=[RichHandler(console=_errors(), show_time=False, show_path=False)]
    )
    try:
        app(standalone_mode=True)
    except KappaquantError as error:
        _errors().print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        _errors().print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
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
    from kappaquant import scanner
    from kappaquant.report import profile_table
    from kappaquant.source import open_source

    opened = open_source(source, revision, stream=stream)
    with _progress("scan") as report:
        profile = scanner.scan(
            opened, group_size=group_size, bits=_numbers(bits, int, "--bits"), jobs=jobs, device=device,
            progress=lambda done, total: report("scan", done, total),
        )  # fmt: skip
    if output:
        profile.save(output)
    if plot:
        scanner.plot(profile, plot)
    _show(profile.to_json() if as_json else profile_table(profile), as_json)


@app.command()
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
    revision: RevisionOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose bits and show exact sizes; reads headers only and writes no weights."""
    from kappaquant.layout import output_bytes
    from kappaquant.report import plan_table
    from kappaquant.sizes import summary
    from kappaquant.source import open_source

    opened = open_source(source, revision, stream=True)
    made = _make_plan(opened, policy, bits, recipe, profile, thresholds, ladder, group_size, overrides, fuse)
    sizes = summary(made, opened.tensors, opened.config)
    files = output_bytes(opened.shards, made.format_of)
    if output:
        made.save(output)
    _show(made.to_json() if as_json else plan_table(made, sizes, files), as_json)


@app.command()
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

    from kappaquant.workers import warm_up

    warm_up(source, jobs)
    from kappaquant.plan import Plan
    from kappaquant.quantizer import Options
    from kappaquant.quantizer import quantize as run
    from kappaquant.source import open_source

    options = Options(effort, target, jobs, device, allow_nonfinite)  # type: ignore[arg-type]
    opened = open_source(source, revision, stream=stream)
    if plan_file:
        if overrides:
            raise PlanError(f"--set does not change the plan file {plan_file}; give --set to the plan command")
        made = Plan.load(plan_file)
    else:
        made = _make_plan(opened, policy, bits, recipe, profile, thresholds, ladder, group_size, overrides, fuse)
    with _progress("quantize") as report:
        path = run(opened, output, made, options, report)
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    _console().print(f"{path}: {decimal(size)}", highlight=False)


@app.command()
def inspect(checkpoint: CheckpointArg, source: OriginalOpt = None, as_json: JsonOpt = False) -> None:
    """Show what a quantized checkpoint holds, by family."""
    from kappaquant.checkpoint import open_checkpoint
    from kappaquant.report import checkpoint_json, checkpoint_table

    opened = open_checkpoint(checkpoint, source=source)
    _show(json.dumps(checkpoint_json(opened), indent=1) if as_json else checkpoint_table(opened), as_json)


@app.command()
def verify(checkpoint: CheckpointArg, source: OriginalOpt = None) -> None:
    """Check names, shapes, completeness and hashes; exit code 1 names what is wrong."""
    from kappaquant.checkpoint import open_checkpoint
    from kappaquant.errors import FormatError

    try:
        opened = open_checkpoint(checkpoint, source=source)
        problems = list(opened.verify())
    except FormatError as problem:
        problems = [str(problem)]
    for problem_text in problems:
        _errors().print(f"FAILED {problem_text}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    for notice in opened.notices:
        _console().print(f"note: {notice}", markup=False, highlight=False)
    hashed = "all hashes match" if opened.format == "kappaquant" else "tq3_native carries no hashes to compare"
    _console().print(f"{checkpoint}: {len(opened.keys())} parameters complete, shapes fit, {hashed}", highlight=False)


@app.command()
def dequantize(
    checkpoint: CheckpointArg,
    output: Annotated[Path, typer.Argument(help="New folder for plain safetensors.")],
    dtype: Annotated[str | None, typer.Option(help="BF16, F16 or F32; default the source's.")] = None,
    source: OriginalOpt = None,
) -> None:
    """Write a plain Hugging Face folder that any tool loads."""
    from kappaquant.checkpoint import open_checkpoint
    from kappaquant.export import dequantize as run

    with _progress("dequantize") as report:
        path = run(open_checkpoint(checkpoint, source=source), output, dtype, lambda d, t: report("write", d, t))
    _console().print(str(path), highlight=False)


@app.command()
def generate(
    checkpoint: CheckpointArg,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: MaxTokensOpt = 256,
    temperature: TemperatureOpt = 0.0,
    device: DeviceOpt = None,
) -> None:
    """Continue a prompt, token by token as they come."""
    from kappaquant.generate import stream

    model, tokenizer = _load(checkpoint, device)
    _emit(stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature))


@app.command()
def chat(
    checkpoint: CheckpointArg,
    max_new_tokens: MaxTokensOpt = 512,
    temperature: TemperatureOpt = 0.0,
    device: DeviceOpt = None,
) -> None:
    """Talk to the model; an empty line or end of input leaves."""
    from kappaquant.generate import chat as reply

    model, tokenizer = _load(checkpoint, device)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = _console().input("[bold]you:[/] ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        pieces = reply(model, tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature)
        messages.append({"role": "assistant", "content": _emit(pieces)})


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
) -> Plan:
    from kappaquant.plan import make_plan, parse_override
    from kappaquant.scanner import Profile

    return make_plan(
        source.tensors, source.config, policy, bits=bits, recipe=recipe,
        profile=Profile.load(profile).kurtosis() if profile else None,
        thresholds=_numbers(thresholds, float, "--thresholds"), ladder=_numbers(ladder, int, "--ladder"), group_size=group_size,
        overrides=[parse_override(text) for text in overrides or []], fuse=fuse,
    )  # fmt: skip


def _load(checkpoint: Path, device: str | None) -> tuple[Any, Any]:
    from transformers.utils import logging as transformers_logging

    from kappaquant import load

    transformers_logging.set_verbosity_error()  # hints at faster kernels would stand in the middle of the answer
    return load(checkpoint, device=device)


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PlanError(f"{option} {text!r}: must be numbers separated by commas") from None


def _show(content: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(content if content.endswith("\n") else content + "\n")
    else:
        _console().print(content)


def _emit(pieces: Any) -> str:
    """Print pieces of text as they come; returns the whole."""
    whole = []
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        whole.append(piece)
    sys.stdout.write("\n")
    return "".join(whole)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    narrow = stderr or sys.stdout.isatty()  # in a pipe or file nothing needs to be squeezed
    return Console(stderr=stderr, width=None if narrow else 140)


def _errors() -> Any:
    return _console(stderr=True)


def _progress(title: str) -> Any:
    from kappaquant.report import ProgressBar

    return ProgressBar(title, _errors())


if __name__ == "__main__":
    main()
