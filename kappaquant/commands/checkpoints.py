"""What a quantized checkpoint holds: inspect, verify, dequantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kappaquant.commands.options import CheckpointArg, JsonOpt, OriginalOpt
from kappaquant.commands.terminal import console, errors, progress, show


def inspect(
    checkpoint: CheckpointArg,
    source: OriginalOpt = None,
    plot: Annotated[Path | None, typer.Option(help="Draw bits by layer and family (PNG; needs matplotlib).")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show what a quantized checkpoint holds, by family."""
    from kappaquant.checkpoint import open_checkpoint
    from kappaquant.report import checkpoint_json, checkpoint_table

    opened = open_checkpoint(checkpoint, source=source)
    if plot:
        from kappaquant.plots import bits_map

        bits_map(opened, plot)
    show(json.dumps(checkpoint_json(opened), indent=1) if as_json else checkpoint_table(opened), as_json)


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
        errors().print(f"FAILED {problem_text}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    for notice in opened.notices:
        console().print(f"note: {notice}", markup=False, highlight=False)
    hashed = "all hashes match" if opened.format == "kappaquant" else "tq3_native carries no hashes to compare"
    console().print(f"{checkpoint}: {len(opened.keys())} parameters complete, shapes fit, {hashed}", highlight=False)


def dequantize(
    checkpoint: CheckpointArg,
    output: Annotated[Path, typer.Argument(help="New folder for plain safetensors.")],
    dtype: Annotated[str | None, typer.Option(help="BF16, F16 or F32; default the source's.")] = None,
    source: OriginalOpt = None,
) -> None:
    """Write a plain Hugging Face folder that any tool loads."""
    from kappaquant.checkpoint import open_checkpoint
    from kappaquant.export import dequantize as run

    with progress("dequantize") as report:
        path = run(open_checkpoint(checkpoint, source=source), output, dtype, lambda d, t: report("write", d, t))
    console().print(str(path), highlight=False)
