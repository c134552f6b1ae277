"""Calibration text: the write command, and the text that quantize calibrates on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kappaquant.commands.options import (
    DeviceOpt,
    GroupOpt,
    JobsOpt,
    RevisionOpt,
    SourceArg,
    group_choice,
    refuse_unused,
)
from kappaquant.commands.terminal import console, progress
from kappaquant.errors import OutputError, PlanError, SourceError
from kappaquant.files.documents import check_file
from kappaquant.formats.base import EFFORTS
from kappaquant.formats.kinds import KINDS, check_kinds, kind_and_bits

if TYPE_CHECKING:
    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.quantizing.calibration.text import Calibration
    from kappaquant.quantizing.calibration.written import Header
    from kappaquant.sources.source import Source

logger = logging.getLogger("kappaquant")


def write(
    model: Annotated[
        str, typer.Argument(help="What writes: a model (folder or Hub id), or a kappaquant checkpoint made from it.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .jsonl to write, for quantize --calibration.")],
    tokens: Annotated[int | None, typer.Option(help="How many tokens to write; 32768 unless given.")] = None,
    device: DeviceOpt = None,
    revision: RevisionOpt = None,
) -> None:
    """Let a model write the text that it, or its source, is calibrated on."""
    from kappaquant.checkpoints.open import open_weights
    from kappaquant.files.processes import choose_device
    from kappaquant.quantizing.calibration.text import check_tokens
    from kappaquant.quantizing.calibration.written import TOKENS, header_of

    if output.suffix != ".jsonl":
        raise OutputError(f"{output}: must be named .jsonl, which quantize --calibration takes")
    check_file(output)
    wanted = TOKENS if tokens is None else tokens
    check_tokens(wanted, "--tokens")
    weights = open_weights(model, revision)
    _write(weights, output, header_of(weights, wanted), choose_device(device))
    console().print(f"{output}: {wanted} tokens written by {model}", markup=False, highlight=False)


def calibrate(
    source: SourceArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="The evidence (JSON) to write, for plan --evidence.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text to measure with, .txt or .jsonl; without it the model writes some first."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", help="How many of its tokens, at most; 32768 unless given.")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="At which each part of the model is tried, 2 to 8, or with its kind such as t3; 3, of the kind of least error, unless given."
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="How it is tried: calibrated (the default), as quantize --calibration rounds, or best, which is faster."
        ),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Without text: errors of weights, and κ; cruder by far, and fast.")
    ] = False,
    group_size: GroupOpt = "auto",
    formats: Annotated[
        str | None,
        typer.Option(
            help="Kinds of formats to measure: k (codebooks), t (trellis codes of 2 to 4 bits), or k,t; all that kernels round on the "
            "device, unless given."
        ),
    ] = None,
    jobs: JobsOpt = None,
    device: DeviceOpt = None,
    revision: RevisionOpt = None,
) -> None:
    """Measure how much worse the model gets by each of its parts, as evidence for plans of any size."""
    from kappaquant.commands.tables import sensitivity_table
    from kappaquant.quantizing.calibration import sensitivity
    from kappaquant.quantizing.calibration.data_free import of_weights
    from kappaquant.quantizing.calibration.trials import Trial
    from kappaquant.sources.open import open_source

    if effort not in (None, "best", "calibrated"):
        raise PlanError(f"--effort {effort}: must be calibrated or best")
    if data_free and (calibration or calibration_tokens is not None):
        raise PlanError("--data-free reads no text; leave out --calibration and --calibration-tokens, or --data-free")
    if data_free:
        refuse_unused({"--bits": bits, "--effort": effort}, "with --data-free, which tries nothing; leave it out")
    check_file(output)
    group, kinds = group_choice(group_size), _kinds_to_measure(formats, bits, device)
    kind, width = _tried(bits or "3", kinds)
    trial = Trial(width, effort or "calibrated", group, kinds, kind)
    opened = open_source(source, revision)
    if data_free:
        with progress("weights") as report:
            found = of_weights(opened, group, jobs, device, lambda done, total: report("weights", done, total), kinds)
    else:
        tokens = sensitivity.TOKENS if calibration_tokens is None else calibration_tokens
        text = calibration_of(opened, output, calibration, tokens, device)
        with progress("layers", "layers") as report:
            found = sensitivity.sensitivities(
                opened, text, trial, device, jobs, lambda done, total: report("layers", done, total)
            )  # fmt: skip
    found.save(output)
    console().print(sensitivity_table(found))
    measured = " and ".join(KINDS[kind].name for kind in found.kinds)
    console().print(
        f"{output}: of {measured}, for kappaquant plan --evidence", markup=False, highlight=False, soft_wrap=True
    )


def _kinds_to_measure(formats: str | None, bits: str | None, device: str | None) -> tuple[str, ...]:
    """Those that --formats says; without it those that kernels round and the one that --bits names, and a warning if these are not all."""
    from kappaquant.files.processes import choose_device
    from kappaquant.quantizing.calibration.trials import kinds_by_kernels

    if formats is not None:
        return check_kinds(formats.split(","))
    where = choose_device(device)
    named = kind_and_bits(bits, f"--bits {bits}") if bits else None
    kinds = check_kinds({*kinds_by_kernels(where), *(named or ())[:1]})
    if missing := [kind for kind in KINDS if kind not in kinds]:
        logger.warning(
            "%s are not measured: no kernel rounds them on %s, and torch takes tens of times as long; --formats %s measures them, and "
            "plans choose from what was measured",
            " and ".join(KINDS[kind].name for kind in missing), where, ",".join(KINDS),
        )  # fmt: skip
    return kinds


def _tried(bits: str, kinds: Sequence[str]) -> tuple[str, int]:
    """The kind and width that --bits says. Raises PlanError."""
    if bits.isdecimal():
        least_error_first = reversed(kinds)  # they stand in the order of ``KINDS``
        return next((kind for kind in least_error_first if int(bits) in KINDS[kind].bits), kinds[0]), int(bits)
    named = kind_and_bits(bits, f"--bits {bits}")
    if not named:
        raise PlanError(f"--bits {bits!r}: must be a width, 2 to 8, or one with its kind such as t3")
    return named


def _write(weights: Source | Checkpoint, path: Path, header: Header, device: str) -> None:
    """Load the model, let it write, and forget it."""
    from transformers.utils import logging as transformers_logging

    from kappaquant.checkpoints.checkpoint import Checkpoint
    from kappaquant.engines.transformers.load import load
    from kappaquant.engines.transformers.original import load_original, load_tokenizer
    from kappaquant.quantizing.calibration.written import save
    from kappaquant.runtime.writing import write

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer: Any
    if isinstance(weights, Checkpoint):
        model, tokenizer = load(weights.path, device=device)
        if tokenizer is None:
            raise SourceError(
                f"{weights.path}: has no tokenizer; copy the original model's tokenizer files to its folder"
            )
    else:
        tokenizer = load_tokenizer(weights)  # what is missing is met before the weights are loaded
        model = load_original(weights, device)
    with progress("calibration text", "tokens") as report:
        texts = write(model, tokenizer, header.tokens, header.rules, report)
    save(path, header, texts)
    del model
    gc.collect()  # the modules of a model refer to each other


def check_calibration(effort: str | None, calibration: Path | None, tokens: int | None) -> None:
    """Raise PlanError where the options that concern calibration contradict each other."""
    from kappaquant.quantizing.calibration.text import check_there, check_tokens

    if effort not in (None, *EFFORTS, "calibrated"):
        raise PlanError(f"--effort {effort}: must be one of {', '.join(EFFORTS)}, calibrated")
    if calibration and effort not in (None, "calibrated"):
        raise PlanError(f"--effort {effort}: is for quantizing without text; leave it out beside --calibration")
    if calibration:
        check_there(calibration)
    if tokens is not None:
        if not calibration and effort != "calibrated":
            raise PlanError(
                f"--calibration-tokens {tokens}: is of no effect without --calibration FILE or --effort calibrated"
            )
        check_tokens(tokens)


def kept_text(output: Path) -> Path:
    """Where the text is kept that a model writes for the checkpoint ``output``."""
    output = output.resolve()
    return output.with_name(f"{output.name}.calibration.jsonl")


def calibration_of(
    source: Source, output: Path, file: Path | None, tokens: int | None, device: str | None
) -> Calibration:
    """The text of a file or, without one, what the model writes itself, as tokens of the model.

    What it writes is kept beside the output, whole or not at all: a run that is repeated goes on with the same text.

    Raises:
        OutputError: the output cannot be written, or something else has the name of its text; before the model begins to write.
    """
    from kappaquant.engines.transformers.original import load_tokenizer
    from kappaquant.files.processes import choose_device
    from kappaquant.quantizing.calibration import text, written

    tokenizer = load_tokenizer(source)
    if file:
        return text.calibration(file, tokenizer, text.TOKENS if tokens is None else tokens)
    kept = kept_text(output)
    _check_before_writing(source, output)
    wanted = written.header_of(source, written.TOKENS if tokens is None else tokens)
    texts, header = text.read(kept, tokenizer) if kept.exists() else ([], None)
    if kept.exists() and header is None:
        raise OutputError(
            f"{kept}: is in the way of the calibration text that the model writes; move it or choose another output"
        )
    if header != wanted:
        _write(source, kept, wanted, choose_device(device))
        texts, header = text.read(kept, tokenizer)
    assert header is not None
    return text.calibration_of_texts(texts, header, tokenizer, wanted.tokens)


def _check_before_writing(source: Source, output: Path) -> None:
    """Raise for what would end the run only after the model has taken its time to write."""
    import torch

    from kappaquant.checkpoints.writer import check_output
    from kappaquant.engines.transformers.original import whole_folder
    from kappaquant.quantizing.calibration.layers import Layers

    check_output(output.absolute(), whole_folder(source))
    Layers(source, "cpu", torch.bfloat16)
