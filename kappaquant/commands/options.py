"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kappaquant.errors import PlanError

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
ActivationsOpt = Annotated[
    str, typer.Option(help="On NVIDIA GPUs: int8, or bf16 for float16 inputs with scales, which lose less.")
]
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
FuseOpt = Annotated[
    bool,
    typer.Option(
        "--fuse-legal",
        "--fuse",
        help="Raise q/k/v, gate/up and what else serving engines fuse to the most bits among them.",
    ),
]


def numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PlanError(f"{option} {text!r}: must be numbers separated by commas") from None
