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
    """Measure decoding and prefill: tokens/s, GB/s of weights, time to first token, peak memory. Contexts 32 and 2048, batch 1."""
    import gc

    import torch
    import transformers

    from kappaquant.checkpoints.open import open_checkpoint
    from kappaquant.evaluate.measures.throughput import token_bytes
    from kappaquant.files.documents import check_file, write_whole
    from kappaquant.files.processes import choose_device
    from kappaquant.runtime.bench import load_original, measure, read_bandwidth
    from kappaquant.sources.open import open_source
    from kappaquant.version import __version__

    if output:
        check_file(output)
    where = choose_device(device)
    cases = [(rows, tokens) for rows in batch or [1] for tokens in context or [32, 2048]]
    bandwidth = read_bandwidth(where)
    model, _ = load_quantized(checkpoint, where, activations)
    nbytes = token_bytes(open_checkpoint(checkpoint))
    found = [_shown(str(checkpoint), row, nbytes, bandwidth) for row in measure(model, cases, steps=steps)]
    if against:
        del model
        gc.collect()  # modules that refer to each other would keep the first model beside the second
        nbytes = token_bytes(open_source(against))
        measured = measure(load_original(against, where), cases, steps=steps)
        found += [_shown(against, row, nbytes, bandwidth) for row in measured]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if where.startswith("cuda") else "cpu",
        "threads": None if where.startswith("cuda") else torch.get_num_threads(),
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "activations": activations,
        "kappaquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": found,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if output:
        write_whole(output, text.encode())
    threads = "" if result["threads"] is None else f", {result['threads']} threads"
    title = f"{result['device']}{threads}, reads {result['read_gb_per_s']} GB/s"
    show(text if as_json else _table(title, found), as_json)


def _shown(model: str, row: Row, nbytes: int, bandwidth: float) -> dict[str, Any]:
    """A row with what its steps read: ``nbytes`` of weights each. Rows of a batch may meet different experts, so they are left out."""
    read = row.decode_tokens_per_s * nbytes if row.batch == 1 else None
    return {
        "model": model, **row.to_json(), "weight_bytes_per_token": nbytes,
        "weights_gb_per_s": None if read is None else round(read / 1e9, 2),
        "of_bandwidth": None if read is None else round(read / bandwidth, 3),
    }  # fmt: skip


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = {
        "model": "model", "batch": "batch", "context": "context", "decode_tokens_per_s": "decode tok/s",
        "weights_gb_per_s": "weights GB/s", "of_bandwidth": "of bandwidth", "prefill_tokens_per_s": "prefill tok/s", "first_token_ms": "first token ms", "peak_gib": "peak GiB",
        "kernels_per_step": "kernels/step",
    }  # fmt: skip
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key == "model" else "right")
    for row in rows:
        table.add_row(*("–" if row[key] is None else str(row[key]) for key in columns))
    return table
