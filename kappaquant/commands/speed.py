"""How fast a quantized model is: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kappaquant.commands.options import ActivationsOpt, CheckpointArg, DeviceOpt, JsonOpt
from kappaquant.commands.terminal import show
from kappaquant.commands.text import load_quantized

if TYPE_CHECKING:
    from kappaquant.runtime.bench import Row


def bench(
    checkpoint: CheckpointArg,
    against: Annotated[
        str | None, typer.Option(help="The original (folder or Hub id), measured in bfloat16 in the same run.")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt; may be given several times.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows at once; may be given several times.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens decoded and timed per row.")] = 32,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result (JSON) here.")] = None,
    device: DeviceOpt = None,
    activations: ActivationsOpt = "int8",
    as_json: JsonOpt = False,
) -> None:
    """Measure decoding and prefill: tokens/s, time to first token, peak memory, kernels per step. Contexts 32 and 2048, batch 1."""
    import gc

    import torch
    import transformers

    from kappaquant.files.documents import check_file, write_whole
    from kappaquant.files.processes import choose_device
    from kappaquant.runtime.bench import load_original, measure
    from kappaquant.version import __version__

    if output:
        check_file(output)
    where = choose_device(device)
    cases = [(rows, tokens) for rows in batch or [1] for tokens in context or [32, 2048]]
    found: list[tuple[str, Row]] = []
    model, _ = load_quantized(checkpoint, where, activations)
    found += [(str(checkpoint), row) for row in measure(model, cases, steps=steps)]
    if against:
        del model
        gc.collect()  # modules that refer to each other would keep the first model beside the second
        found += [(against, row) for row in measure(load_original(against, where), cases, steps=steps)]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if where.startswith("cuda") else "cpu",
        "activations": activations,
        "kappaquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [{"model": name, **row.to_json()} for name, row in found],
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if output:
        write_whole(output, text.encode())
    show(text if as_json else _table(result["device"], result["rows"]), as_json)


def _table(device: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=device, title_justify="left")
    columns = {
        "model": "model", "batch": "batch", "context": "context", "decode_tokens_per_s": "decode tok/s",
        "prefill_tokens_per_s": "prefill tok/s", "first_token_ms": "first token ms", "peak_gib": "peak GiB",
        "kernels_per_step": "kernels/step",
    }  # fmt: skip
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key == "model" else "right")
    for row in rows:
        table.add_row(*("–" if row[key] is None else str(row[key]) for key in columns))
    return table
