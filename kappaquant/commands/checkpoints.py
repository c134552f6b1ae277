"""What a quantized checkpoint holds: inspect, verify, dequantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.options import (
    CheckpointArg,
    JsonOpt,
    OriginalOpt,
    OutputArg,
    OutputOpt,
    destination,
    refuse_original,
)
from kappaquant.commands.terminal import console, errors, progress, show
from kappaquant.errors import PlanError

if TYPE_CHECKING:
    from kappaquant.checkpoints.checkpoint import Checkpoint


def inspect(
    checkpoint: CheckpointArg,
    source: OriginalOpt = None,
    plot: Annotated[Path | None, typer.Option(help="Draw bits by layer and family (PNG; needs matplotlib).")] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp", help="Say what so many cards hold each, if they can share it; exit code 1 says what cannot."
        ),
    ] = None,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="With --tp: routed experts are dealt out whole.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Show what a quantized checkpoint holds, by family."""
    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.commands.tables import checkpoint_json, checkpoint_table

    if tp is not None and tp < 1:
        raise PlanError(f"--tp {tp}: must be 1 or more cards")
    if expert_parallel and tp is None:
        raise PlanError("--expert-parallel: says how --tp cards share a checkpoint; give --tp too")
    if plot:
        from kappaquant.commands.plots import bits_map, png_figure

        png_figure(plot)
    opened = open_checkpoint(checkpoint, source=source)
    refuse_original(opened, source)
    if plot:
        bits_map(opened, plot)
    show(json.dumps(checkpoint_json(opened), indent=1) if as_json else checkpoint_table(opened), as_json)
    if tp is not None and not _fits(opened, tp, expert_parallel):
        raise typer.Exit(1)


def _fits(opened: Checkpoint, cards: int, expert_parallel: bool) -> bool:
    """Whether so many cards can share a checkpoint, and what each then holds; says why not, and how many can: all on stderr."""
    from rich.filesize import decimal

    from kappaquant.kernels.cuda import tiles
    from kappaquant.models import sharding as parallel

    what = opened.tensors, opened.format_of, opened.config
    found = list(parallel.problems(*what, cards, expert_parallel=expert_parallel))
    for problem in found:
        errors().print(f"FAILED {problem}", markup=False, highlight=False, soft_wrap=True)
    able = ", ".join(map(str, parallel.sizes(*what, expert_parallel=expert_parallel)))
    errors().print(f"{cards} cards can{'not' if found else ''} share it; these numbers can: {able}", highlight=False)
    if not found:
        packed, padded = (
            parallel.bytes_per_card(*what, cards, expert_parallel=expert_parallel, tile=tile)
            for tile in ((1, 1), (tiles.ROWS, tiles.INPUTS))
        )
        more = f", {decimal(padded)} on NVIDIA GPUs, which take {tiles.ROWS} rows and {tiles.INPUTS} inputs at once"
        errors().print(
            f"weights on each card: {decimal(packed)} ({packed} bytes){more if padded > 1.005 * packed else ''}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return not found


def verify(checkpoint: CheckpointArg, source: OriginalOpt = None) -> None:
    """Check names, shapes, completeness and hashes; exit code 1 names what is wrong."""
    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.errors import FormatError

    try:
        opened = open_checkpoint(checkpoint, source=source)
        refuse_original(opened, source)
        problems = list(opened.verify())
    except FormatError as problem:
        problems = [str(problem)]
    for problem_text in problems:
        errors().print(f"FAILED {problem_text}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    for notice in opened.notices:
        console().print(f"note: {notice}", markup=False, highlight=False)
    container = opened.container
    hashed = "all hashes match" if container.hashed else f"{container.id} carries no hashes to compare"
    console().print(f"{checkpoint}: {len(opened.keys())} parameters complete, shapes fit, {hashed}", highlight=False)


def dequantize(
    checkpoint: CheckpointArg,
    place: OutputArg = None,
    output: OutputOpt = None,
    dtype: Annotated[str | None, typer.Option(help="BF16, F16 or F32; default the source's.")] = None,
    source: OriginalOpt = None,
) -> None:
    """Write a plain Hugging Face folder that any tool loads."""
    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.exports.plain import dequantize as run

    opened = open_checkpoint(checkpoint, source=source)
    refuse_original(opened, source)
    with progress("dequantize") as report:
        path = run(
            opened,
            destination(place, output),
            dtype,
            lambda d, t: report("write", d, t),
        )
    console().print(str(path), highlight=False)
