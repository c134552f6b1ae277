"""How far a checkpoint is from its original: evaluate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kappaquant.commands.options import ActivationsOpt, DeviceOpt, JsonOpt, RevisionOpt, in_checkpoint, refuse_unused
from kappaquant.commands.terminal import errors, progress
from kappaquant.errors import UnsupportedError

if TYPE_CHECKING:
    from kappaquant.evaluate.runs.pair import Pair


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Quantized checkpoint, or one of plain safetensors: folder or Hub id.")
    ],
    against: Annotated[str, typer.Option(help="The original it was made from: folder or Hub id.")],
    text: Annotated[
        Path | None, typer.Option(help="Plain text to read; default evaluation.txt in the original's folder.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Read so many tokens of the text; default all.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a sequence; each is read by itself.")] = 512,
    bos: Annotated[
        str,
        typer.Option(
            help="What each sequence begins with: auto for what the tokenizer puts before a text; always or never its BOS token."
        ),
    ] = "auto",
    top_k: Annotated[
        int, typer.Option(help="Probabilities of the original kept for each token; all make the divergence exact.")
    ] = 256,
    dtype: Annotated[str, typer.Option(help="float32, or auto for that of config.json.")] = "auto",
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Also each tensor family alone, in the otherwise original model.")
    ] = False,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor/--no-noise-floor", help="Also the original against itself in other batches.")
    ] = True,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Questions for both models: gsm8k=FILE, gsm8k-200=FILE (as published), arithmetic_stories, or a task of lm-eval."
        ),
    ] = None,
    shots_from: Annotated[
        Path | None, typer.Option(help="Worked examples for --task NAME=FILE, of the same form.")
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Ask the first so many; default all.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Worked examples in each prompt; default as the task has it.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; default as the task has it.")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask through the chat template.")] = False,
    task_batch: Annotated[int | None, typer.Option(help="Questions answered at once; 16 unless given.")] = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also tokens per second and memory of both, the original in bfloat16.")
    ] = False,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Prompt tokens for --throughput; several times for several; default 32 and 1024."),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(help="Keep predictions here, to go on after an interruption and for other checkpoints."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The report; default evaluation.json in the checkpoint.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here too.")] = None,
    device: DeviceOpt = None,
    activations: ActivationsOpt = "int8",
    revision: RevisionOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure divergence, perplexity, tasks and speed against the original, with intervals; each model is loaded alone."""
    from transformers.utils import logging as transformers_logging

    from kappaquant.checkpoints.side_files import EVALUATION_NAME
    from kappaquant.evaluate.documents.evaluation import Evaluation
    from kappaquant.evaluate.documents.markdown import markdown as tables
    from kappaquant.evaluate.measures.scores import carry_over
    from kappaquant.evaluate.measures.throughput import cases, measure
    from kappaquant.evaluate.runs.against import Options, evaluate_against
    from kappaquant.evaluate.runs.pair import content_digest, open_pair
    from kappaquant.evaluate.runs.questions import parse_task
    from kappaquant.files.documents import check_file, write_whole
    from kappaquant.files.processes import choose_device

    if not task:
        of_tasks = {"--shots-from": shots_from, "--questions": questions, "--shots": shots, "--max-tokens": max_tokens}
        of_tasks |= {"--chat-template": chat_template, "--task-batch": task_batch}
        refuse_unused(of_tasks, "without --task")
    if not throughput:
        refuse_unused({"--context": context}, "without --throughput")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # there is one
    options = Options(
        window, tokens, top_k, dtype, choose_device(device), activations, noise_floor=noise_floor, by_layer=by_layer, bos=bos,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    pair = open_pair(checkpoint, against, revision)
    for notice in pair.notices:
        errors().print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
    report = output or in_checkpoint(pair.path, EVALUATION_NAME, "-o")
    for path in filter(None, (report, markdown)):
        check_file(path)
    earlier = Evaluation.load(report) if report.exists() else None
    asked = [
        parse_task(
            name, pair.source.folder, shots_from=shots_from, questions=questions, shots=shots, max_tokens=max_tokens,
            chat_template=chat_template, batch_size=16 if task_batch is None else task_batch,
        )
        for name in task or ()
    ]  # fmt: skip
    timed = cases(pair, context) if throughput else []
    beside = output.parent if output else pair.path.absolute().parent
    kept = logits or beside / f"{pair.name}.logits"
    with progress("evaluate", "it") as bar:
        found = evaluate_against(pair, _text(pair, text), kept, options, bar, asked)
        if timed:
            found = replace(found, throughput=measure(pair, timed, options.device, activations, bar))
    if earlier:
        found, dropped = carry_over(found, earlier, content_digest(pair.checkpoint), content_digest(pair.source))
        for notice in dropped:
            errors().print(f"note: {report}: {notice}", markup=False, highlight=False, soft_wrap=True)
    found.save(report)
    shown = tables(found)
    if markdown:
        write_whole(markdown, shown.encode())
    typer.echo(found.to_json() if as_json else shown, nl=False)
    errors().print(f"{report}; predictions are kept in {kept}", markup=False, highlight=False, soft_wrap=True)


def _text(pair: Pair, given: Path | None) -> Path:
    from kappaquant.evaluate.runs.against import TEXT_NAME

    if given is None and not (pair.source.folder / TEXT_NAME).exists():
        raise UnsupportedError(
            f"{pair.source.label}: has no {TEXT_NAME}; give --text FILE, plain text that the model was not trained on"
        )
    return given or pair.source.folder / TEXT_NAME
