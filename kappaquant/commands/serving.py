"""Checkpoints for others to use: convert, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kappaquant.commands.options import CheckpointArg, OriginalOpt
from kappaquant.commands.terminal import console, errors, progress
from kappaquant.errors import PlanError


def convert(
    checkpoint: CheckpointArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for the v1 checkpoint.")],
    norms: Annotated[str, typer.Option(help="f32 keeps every bit; f16 saves 2 bytes a group.")] = "f32",
    source: OriginalOpt = None,
) -> None:
    """Re-label a tq3_native checkpoint as kappaquant v1, without changing a code."""
    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.exports.kappaquant_v1 import convert as run

    opened = open_checkpoint(checkpoint, source=source)
    for notice in opened.notices:
        errors().print(f"note: {notice}", markup=False, highlight=False)
    with progress("convert") as report:
        path = run(opened, output, norms.upper(), lambda done, total: report("write", done, total))
    console().print(str(path), highlight=False)


def serve(
    checkpoint: CheckpointArg,
    options: Annotated[
        list[str] | None, typer.Argument(help="After --, options for the engine, such as --tensor-parallel-size 2.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together, at most; default the model's.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="vllm, mlx or transformers; default the first that can run it here.")
    ] = None,
    mlx: Annotated[bool, typer.Option("--mlx", help="Short for --engine mlx.")] = False,
) -> None:
    """Answer OpenAI's HTTP API, through vLLM, MLX or transformers."""
    import os

    from kappaquant.engines.serve import choose

    if mlx and engine not in (None, "mlx"):
        raise PlanError(f"--mlx: is short for --engine mlx, and contradicts --engine {engine}; give one of them")
    server = choose(checkpoint, "mlx" if mlx else engine, host=host, port=port, context=context, options=options or ())
    errors().print(f"{server.engine}: {'; '.join(server.why)}", markup=False, highlight=False, soft_wrap=True)
    errors().print(f"will listen at http://{host}:{port}", markup=False, highlight=False)
    os.execv(server.command[0], server.command)  # signals then reach the server itself
